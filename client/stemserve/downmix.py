"""Any channel layout to stereo.

Mono is copied to both channels. Layouts of 3 to 8 channels are mixed down with the coefficients
of ITU-R BS.775-3 (Annex 4): centre and surrounds at -3 dB, low-frequency effects left out. Channel
order is that of WAVE_FORMAT_EXTENSIBLE, which libsndfile hands over for wav, flac and ogg.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from stemserve.errors import ChannelCountError

_3DB: Final = float(np.sqrt(0.5))
_L: Final = (1.0, 0.0)
_R: Final = (0.0, 1.0)
_CENTRE: Final = (_3DB, _3DB)
_LFE: Final = (0.0, 0.0)
_SURROUND_L: Final = (_3DB, 0.0)
_SURROUND_R: Final = (0.0, _3DB)
_SURROUND_C: Final = (0.5, 0.5)

LAYOUTS: Final[dict[int, tuple[tuple[float, float], ...]]] = {
    1: ((1.0, 1.0),),
    2: (_L, _R),
    3: (_L, _R, _CENTRE),
    4: (_L, _R, _SURROUND_L, _SURROUND_R),
    5: (_L, _R, _CENTRE, _SURROUND_L, _SURROUND_R),
    6: (_L, _R, _CENTRE, _LFE, _SURROUND_L, _SURROUND_R),
    7: (_L, _R, _CENTRE, _LFE, _SURROUND_C, _SURROUND_L, _SURROUND_R),
    8: (_L, _R, _CENTRE, _LFE, _SURROUND_L, _SURROUND_R, _SURROUND_L, _SURROUND_R),
}


def to_stereo(frames: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Mix interleaved frames [n, channels] float32 down to [2, n] float32, contiguous.

    Raises:
        ChannelCountError: there is no layout with so many channels.
    """
    channels = frames.shape[1]
    if channels == 2:
        return np.ascontiguousarray(frames.T)
    if channels == 1:
        return np.repeat(frames.T, 2, axis=0)
    check_channels(channels)
    matrix = np.array(LAYOUTS[channels], np.float32)  # [channels, 2]
    return np.ascontiguousarray((frames @ matrix).T)


def check_channels(channels: int) -> None:
    """Raise ChannelCountError unless a layout with so many channels can be mixed down."""
    if channels not in LAYOUTS:
        raise ChannelCountError(
            f"the file has {channels} channels; expected 1 (mono) to {max(LAYOUTS)} (7.1). "
            "Mix it down to stereo first."
        )
