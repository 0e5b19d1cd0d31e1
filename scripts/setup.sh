#!/usr/bin/env bash
# Make or refresh the virtual environment that `make demo` and `make test` run in.
#
#   scripts/setup.sh VENV EXTRAS        e.g. scripts/setup.sh .venv export,server
#
# Variables:
#   PYTHON       interpreter to use (default: python3.11, else a python3 that is one)
#   TORCH        PyTorch requirement (default: torch==2.13.0)
#   TORCH_INDEX  package index with PyTorch's CPU builds, used where it can be reached
#   ALLOW_CUDA   set to 1 to accept PyTorch's CUDA build, several gigabytes
set -euo pipefail

venv=$1
extras=$2
torch=${TORCH:-torch==2.13.0}
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

say() { printf '%s\n' "$*" >&2; }
fail() { say "Error: $*"; exit 1; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return
        fi
    done
}

# apt_install PACKAGE... : install system packages when we may, else say in a sentence what to do.
apt_install() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        say "Installing system packages: $*"
        (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@") >&2 ||
            fail "apt-get could not install $*; install them by hand and run this again."
    else
        fail "these system packages are needed: $*. Run \`sudo apt-get install $*\` and try again."
    fi
}

stamp="$venv/.stemserve-$extras"
digest=$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
for known in "$stamp" "$stamp",*; do
    if [ "$(cat "$known" 2>/dev/null)" = "$digest:$PWD" ]; then
        exit 0
    fi
done

python=$(find_python)
if [ -z "$python" ]; then
    apt_install python3.11 python3.11-venv libpython3.11
    python=$(find_python)
    [ -n "$python" ] || fail "Python 3.11 is needed; install it, or name one with PYTHON=…"
fi
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    apt_install "python$minor-venv"
fi
# Triton's Python stub is linked against the interpreter's shared library.
if ! "$python" - "$minor" <<'EOF'
import ctypes, sys, sysconfig
name = f"libpython{sys.argv[1]}.so.1.0"
for path in (f"{sysconfig.get_config_var('LIBDIR')}/{name}", f"{sys.base_prefix}/lib/{name}", name):
    try:
        ctypes.CDLL(path)
        sys.exit(0)
    except OSError:
        pass
sys.exit(1)
EOF
then
    apt_install "libpython$minor"
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
# Only what is downloaded, with its size, and what came of it.
downloads() { grep -E '^ *(Downloading|Using cached|Processing|Successfully installed|ERROR)' || true; }

if ! "$venv/bin/python" -W ignore -c 'import torch' 2>/dev/null; then
    index=()
    if "$venv/bin/python" - "$torch_index" <<'EOF'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=5)
except Exception:
    sys.exit(1)
EOF
    then
        index=(--extra-index-url "$torch_index")
    fi
    chosen=$(pip install --dry-run --no-deps --quiet --report - "${index[@]}" "$torch" 2>/dev/null |
        "$venv/bin/python" -c 'import json, sys
print(json.load(sys.stdin)["install"][0]["metadata"]["version"])') ||
        fail "pip finds no $torch; name another with TORCH=… or an index that has it with TORCH_INDEX=…"
    if [[ $chosen != *+cpu* && $(uname -m) = x86_64 && ${ALLOW_CUDA:-} != 1 ]]; then
        fail "only a CUDA build of PyTorch was found ($chosen, several gigabytes). Make" \
            "$torch_index reachable, name another index with TORCH_INDEX=…, or set ALLOW_CUDA=1."
    fi
    say "Installing PyTorch $chosen"
    pip install "${index[@]}" "$torch" 2>&1 | downloads >&2
    "$venv/bin/python" -W ignore -c 'import torch' || fail "PyTorch was not installed; see above."
fi
say "Installing stemserve[$extras]"
pip install -e ".[$extras]" 2>&1 | downloads >&2
if [[ ,$extras, == *,dev,* ]]; then
    # What the tests compare with. Their own requirements would bring torchaudio and a CUDA torch.
    pip install --no-deps "demucs==4.1.0" "openunmix==1.3.0" 2>&1 | downloads >&2
fi
"$venv/bin/python" -c 'import stemserve' || fail "stemserve was not installed; see above."
printf '%s' "$digest:$PWD" >"$stamp"
say "Environment: $venv ($(du -sh "$venv" | cut -f1))"
