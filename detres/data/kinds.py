"""Kinds of problems in data sets: how bad each is, what it does, and what mends it.

Readers and checks name a kind by its slug; `detres data check` groups by it, and docs/data.md lists all. In the order
in which a report tells groups of the same severity.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]  # refused by training; told; for information


class Kind(NamedTuple):
    severity: Severity
    title: str  # heading of the group, such as "boxes without area"
    effect: str  # on training or on AP
    fix: str  # "" if there is nothing to mend


_STOPS = "training stops at the image, perhaps hours in"
_REFUSED = "training refuses the object: its label would be lost"

KINDS: dict[str, Kind] = {
    # Structure
    "unreadable": Kind("error", "files that cannot be read", "nothing in them can be used",
                       "correct the file where the message says, or export it again"),
    "invalid": Kind("error", "invalid entries", "training refuses them", "correct or delete them"),
    "bad_category": Kind("error", "categories that are not what they must be",
                         "the labels of their objects mean nothing", "give each a whole number as id and a name"),
    "duplicate_category": Kind("error", "categories with the id or name of another",
                               "the labels of two classes are mixed up", "merge them, or rename one"),
    "category_keypoints": Kind("error", "categories whose keypoints cannot be used",
                               "a keypoint head has one list of names", "use a file for each set of keypoints"),
    "bad_image": Kind("error", "image entries that are not what they must be",
                      "the image and its objects are lost", "give each a whole number or a string as id"),
    "duplicate_image": Kind("error", "images with the id of another, or listed twice",
                            "objects are assigned to the wrong image, or trained on twice",
                            "give the image another id, or delete it"),
    "image_size": Kind("error", "images without a valid size", "their objects cannot be checked or evaluated",
                       "state height and width of the file in pixels"),
    "images_nowhere": Kind("error", "image folders that are not found", "there is nothing to train on",
                           "say where the images are: --images DIR, in a config data.*.images"),
    "image_missing": Kind("error", "images without a readable file", "training cannot load them: their objects are lost",
                          "add the file, or delete the entry and its objects"),
    "bad_annotation": Kind("error", "annotations that are not what they must be", _REFUSED,
                           "give each a whole number as id and values of the right type"),
    "duplicate_annotation": Kind("error", "annotations with the id of another",
                                 "evaluation counts them as one object", "renumber them, or delete the copy"),
    "unknown_image": Kind("error", "annotations of an image that does not exist",
                          "their labels are lost in silence by most tools", "add the image, or delete them"),
    "unknown_category": Kind("error", "annotations of a class that does not exist", _REFUSED,
                             "add the class, or correct the annotation"),
    "bad_iscrowd": Kind("error", "iscrowd that is neither 0 nor 1", _REFUSED, "write 0 or 1"),
    "bad_keypoints": Kind("error", "keypoints that are not what they must be", _REFUSED,
                          "give x, y and visibility for each name"),
    "bad_row": Kind("error", "rows that are not numbers", _REFUSED,
                    "write the class, then the box or polygon in fractions of the image"),
    "bad_xml": Kind("error", "images without a readable XML file", "the image and its objects are lost",
                    "correct the file, or take the image out of the list"),
    # Geometry
    "boxes_xyxy": Kind("error", "boxes given as corners (x1, y1, x2, y2), not as the format has them",
                       "every box is too large: the detector learns wrong boxes", "convert the boxes: --fix does"),
    "boxes_xywh": Kind("error", "corners given as x, y, width, height",
                       "boxes are inside out or too small: their labels are lost", "convert the boxes: --fix does"),
    "boxes_normalised": Kind("error", "coordinates in fractions of the image instead of pixels",
                             "every box is a speck in the corner: nothing is learned",
                             "multiply by width and height: --fix does"),
    "boxes_in_pixels": Kind("error", "coordinates in pixels instead of fractions of the image",
                            "the boxes lie outside the image: their labels are lost",
                            "divide by width and height: --fix does"),
    "bad_box": Kind("error", "boxes that are not four numbers", _REFUSED, "write four numbers, or delete the object"),
    "box_not_finite": Kind("error", "boxes with NaN or infinity",
                           "the loss becomes NaN and with it the network", "correct the box, or delete the object"),
    "box_negative": Kind("error", "boxes of negative width or height", _REFUSED,
                         "swap the corners, or redraw the box"),
    "box_empty": Kind("error", "boxes without area", "no proposal matches them: recall is lost",
                      "redraw the box, or delete the object"),
    "box_outside": Kind("error", "boxes outside their image", "there is nothing to see in them: recall is lost",
                        "correct the box, or the size stated for the image"),
    "bad_area": Kind("error", "areas that are not numbers of pixels", "AP by size cannot place the object",
                     "delete the area: it is then computed"),
    "bad_segmentation": Kind("error", "masks that are neither polygons nor an RLE", _REFUSED,
                             "write a list of flat lists of x, y, or an RLE with size and counts"),
    "polygon_odd": Kind("error", "polygons with a number missing", "all points after it are swapped: x for y",
                        "add the number, or redraw the polygon"),
    "polygon_short": Kind("error", "polygons of fewer than 3 points", "they have no area: the mask is empty",
                          "redraw or delete them"),
    "polygon_not_finite": Kind("error", "polygons with NaN, infinity or points far from the image",
                               "drawing the mask fails in the middle of training", "correct or delete the polygon"),
    "rle_size": Kind("error", "RLE masks of another size than their image", "the mask lies across other pixels",
                     "encode the mask at the image's height and width"),
    "bad_rle": Kind("error", "RLE masks whose counts are damaged or do not cover the image",
                    "decoding them fails, or reads beyond memory", "encode the mask again"),
    # Image files
    "image_zero_bytes": Kind("error", "image files of zero bytes", _STOPS, "download or copy them again"),
    "image_truncated": Kind("error", "image files that end too early", _STOPS, "download or copy them again"),
    "image_not": Kind("error", "image files that hold something else", _STOPS,
                      "download them again, or convert them to JPEG or PNG"),
    "image_damaged": Kind("error", "image files that cannot be decoded", _STOPS, "replace them"),
    "image_too_large": Kind("error", "images of too many pixels", _STOPS, "cut them into tiles"),
    "image_differs": Kind("error", "image files of another size than stated",
                          "boxes lie elsewhere than the objects: training refuses it",
                          "correct width and height, or restore the files that were annotated"),
    "image_turned": Kind("error", "images annotated without their EXIF orientation",
                         "boxes lie across the objects: training refuses it",
                         "take the orientation out of the files (exiftool -Orientation= FILE)"),
    "class_unknown": Kind("error", "classes that training does not know",
                          "evaluation refuses the split: these objects can never be found",
                          "use one list of classes for all splits"),
    # Warnings
    "box_past_edge": Kind("warning", "boxes that reach past the edge of their image", "training clips them",
                          "clip the box, if the object ends at the edge"),
    "box_mask_differs": Kind("warning", "boxes that do not fit their mask",
                             "box and mask heads learn different objects", "compute the box from the mask"),
    "area_differs": Kind("warning", "areas that are not those of the mask (or of the box)",
                         "AP for small, medium and large objects sorts them wrongly", "compute the area again"),
    "mask_empty": Kind("warning", "masks without a pixel inside", "a mask head is taught that nothing is there",
                       "redraw the polygon, or delete the object"),
    "polygon_crosses": Kind("warning", "polygons whose outline crosses itself",
                            "the mask has holes or spurs where it does", "redraw the polygon, if the object is larger"),
    "id_zero": Kind("warning", "annotations with id 0",
                    "pycocotools never counts them as found: recall is lost", "number annotations from 1"),
    "no_annotations": Kind("warning", "splits without any image or annotation", "there is nothing to learn or to measure",
                           "check the export"),
    "image_leak": Kind("warning", "images of one split that are in another, too",
                       "AP is too high: the model is measured on what it was trained on",
                       "take them out of one of the splits"),
    "image_near_leak": Kind("warning", "images that are almost the same as one of another split",
                            "AP is too high: the model has seen the scene in training",
                            "split by scene, video or source, not image by image"),
    "image_listed_twice": Kind("warning", "image files listed twice in a split",
                               "each entry teaches that the other's objects are background",
                               "merge the objects in one entry"),
    "image_copy": Kind("warning", "images whose file is there twice in a split",
                       "they weigh double, in training and in AP", "delete one, with its objects"),
    "copy_labels_differ": Kind("warning", "copies of an image with other objects",
                               "one of them teaches or measures what is wrong", "look at both and correct one"),
    "image_turn_unclear": Kind("warning", "images with an EXIF orientation that their size does not show",
                               "detres turns them: boxes made without the tag lie elsewhere than the objects",
                               "look at one (detres data view); take the tag out if its boxes are off"),
    "image_dark": Kind("warning", "images of 16 bits that use only the lowest values",
                       "scaled to 8 bits as a whole they are black", "stretch their values, or save as 8 bits"),
    "image_blank": Kind("warning", "images of one colour", "there is nothing to see: objects in them cannot be learned",
                        "delete them, or restore the file"),
    "image_huge": Kind("warning", "images of more than 50 million pixels",
                       "each takes a second and 150 MB to load, every epoch; small objects vanish when it is scaled",
                       "cut them into tiles"),
    "object_twice": Kind("warning", "objects drawn twice",
                         "one box of the two is always missed: recall is lost, or doubles are learned", "delete one"),
    "object_two_classes": Kind("warning", "objects that have two classes",
                               "one of the two is wrong: it is taught, and missed in AP",
                               "delete the wrong one, if the data set means one class for each object"),
    "box_under_pixel": Kind("warning", "boxes under a pixel wide or high",
                            "no network finds them: recall is lost", "redraw or delete them"),
    "class_fills_images": Kind("warning", "classes whose boxes are mostly whole images",
                               "where objects are is not taught", "draw boxes around the objects"),
    "class_name_variant": Kind("warning", "classes that are another's name in another spelling",
                               "objects of one kind are split over two classes, and count as false in each other's",
                               "merge them"),
    "class_name_blank": Kind("warning", "class names with blanks at their ends, or empty",
                             "they match no other list of classes", "rename them"),
    "class_not_trained": Kind("warning", "classes that other splits have and training has not",
                              "they are never found: AP 0, which counts in the mean",
                              "move images with them to the training split, or delete the class"),
    "class_exchanged": Kind("warning", "classes whose names seem exchanged between splits",
                            "the model is measured on other classes than it was taught",
                            "look at both splits; use one list of classes in one order"),
    "class_id_differs": Kind("warning", "classes with another id than in training",
                             "detres matches names; other tools match ids, and mix classes up",
                             "use one list of categories for all splits"),
    # Notes
    "category_gap": Kind("note", "category ids with gaps", "no harm: labels are numbered 0 to K-1 in their order", ""),
    "image_empty": Kind("note", "images without annotations",
                        "they train as background (data.skip_empty leaves them out); what is found there counts as false",
                        "annotate them, if they show objects"),
    "box_speck": Kind("note", "boxes of less than 4 pixels",
                      "smaller than a cell of the finest features: hardly ever found",
                      "train at a larger scale or on tiles, or delete them"),
    "class_rare": Kind("note", "classes in 10 training images or fewer", "AP of these classes stays low, and noisy",
                       "collect more, or sample their images more often"),
    "class_not_measured": Kind("note", "classes that training has and another split has not",
                               "their AP is not defined: the mean leaves them out", "add images with them"),
    "class_unused": Kind("note", "classes without an object in any split", "an output that is never right",
                         "delete the class, or annotate its objects"),
    "image_near_copy": Kind("note", "images that are almost the same as another of their split",
                            "they weigh double; frames of a video are", "keep one of them, unless it is meant"),
    "image_exif": Kind("note", "images with an EXIF orientation",
                       "detres turns them, as annotated; tools that do not will misplace the boxes",
                       "store the pixels upright, without the tag"),
    "image_alpha": Kind("note", "images with transparent pixels", "alpha is dropped: what was hidden is seen",
                        "blend them with a background"),
    "image_cmyk": Kind("note", "images in CMYK", "converted to RGB without colour profile: colours shift a little",
                       "save as RGB"),
    "image_deep": Kind("note", "images of 16 bits", "scaled to 8 bits: 0-65535 becomes 0-255", ""),
    "image_grey": Kind("note", "images without colour", "grey is repeated in three channels", ""),
    "image_frames": Kind("note", "animations and files of several pages", "the first one is used", "save it alone"),
    "image_suffix": Kind("note", "image files whose suffix is of another format",
                         "none here: the content counts; other tools may refuse them", "rename them"),
}


def severity(kind: str) -> Severity:
    return KINDS[kind].severity


def table() -> str:
    """All kinds in Markdown, as in docs/data.md."""
    rows = [f"| {severity} | `{slug}` | {title} | {effect} | {fix} |"
            for severity in ("error", "warning", "note")
            for slug, (own, title, effect, fix) in KINDS.items() if own == severity]
    return "\n".join(["| | kind | what | what it does | what mends it |", "|---|---|---|---|---|", *rows])
