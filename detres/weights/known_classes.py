"""Classes that published weights were trained on, which their tensors do not name: told from how many there are."""

from __future__ import annotations

from torchvision.models import get_model_weights

VOC = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
       "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
CITYSCAPES_THINGS = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
CITYSCAPES = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
              "terrain", "sky", *CITYSCAPES_THINGS)
# Stuff of COCO's panoptic task, by category id.
COCO_STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain", 112: "door-stuff",
    118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house", 130: "light", 133: "mirror-stuff",
    138: "net", 141: "pillow", 144: "platform", 145: "playingfield", 147: "railroad", 148: "river", 149: "road",
    151: "roof", 154: "sand", 155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind",
    181: "window-other", 184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged"}

# Pairs of COCO's 17 keypoints, counted from 0, that a line joins.
COCO_SKELETON = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9),
                 (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))

Classes = tuple[tuple[str, ...], tuple[int, ...]]  # names, and ids of the data set


def detection_classes(count: int) -> Classes | None:
    """COCO's 80, or its 90 ids with gaps as torchvision has them; VOC's 20; the 8 of Cityscapes. Else None."""
    names = _coco_by_id()
    known = {i: name for i, name in names.items() if name != "N/A"}
    if count == len(known):
        return tuple(known.values()), tuple(known)
    if count == len(names):
        return tuple(name if name != "N/A" else f"N/A {i}" for i, name in names.items()), tuple(names)
    known = {len(VOC): VOC, len(CITYSCAPES_THINGS): CITYSCAPES_THINGS}.get(count)
    return known and (known, tuple(range(1, count + 1)))


def keypoint_classes(count: int) -> Classes | None:
    """A person, as COCO has keypoints of nothing else. Else None."""
    return (("person",), (1,)) if count == 1 else None


def keypoint_layout(count: int) -> dict[str, list]:
    """Names and skeleton of COCO's 17 keypoints, as in `WeightsMeta`; of another number nothing is known."""
    names = get_model_weights("keypointrcnn_resnet50_fpn").DEFAULT.meta["keypoint_names"]
    return {"names": list(names), "skeleton": [list(bone) for bone in COCO_SKELETON]} if count == len(names) else {}


def semantic_classes(count: int) -> Classes | None:
    """VOC's 20 after the background; "things", then COCO's stuff, of a panoptic model; Cityscapes' 19. Else None."""
    if count == len(COCO_STUFF) + 1:
        return ("things", *COCO_STUFF.values()), (0, *COCO_STUFF)
    known = {len(VOC) + 1: ("background", *VOC), len(CITYSCAPES): CITYSCAPES}.get(count)
    return known and (known, tuple(range(count)))


def image_classes(count: int) -> Classes | None:
    """ImageNet's 1000, as torchvision names them; the second of two equal names has a number. Else None."""
    names = get_model_weights("resnet50")["IMAGENET1K_V1"].meta["categories"]
    if count != len(names):
        return None
    return tuple(name if name not in names[:i] else f"{name} 2" for i, name in enumerate(names)), tuple(range(count))


def _coco_by_id() -> dict[int, str]:
    """Names of ids 1 to 90, "N/A" where COCO has none."""
    names = get_model_weights("fasterrcnn_resnet50_fpn")["COCO_V1"].meta["categories"]
    return dict(enumerate(names[1:], 1))
