"""Which models does torch.hub find here? The six, by their names.

torch.hub.load(FOLDER, "alt_gvt_small", source="local", num_classes=10), or of a repository "OWNER/NAME". pretrained=True fetches
timm's published weights, as main.py --pretrained does; num_classes, drop_path_rate, features_only and all else go to
timm.create_model.
"""
from gvt import alt_gvt_base, alt_gvt_large, alt_gvt_small, pcpvt_base_v0, pcpvt_large_v0, pcpvt_small_v0

dependencies = ["torch", "torchvision", "timm", "einops"]
__all__ = ["alt_gvt_base", "alt_gvt_large", "alt_gvt_small", "pcpvt_base_v0", "pcpvt_large_v0", "pcpvt_small_v0"]
