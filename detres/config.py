"""Every knob once: type, unit, bound, default, and where the default comes from.

Defaults are those of Faster R-CNN R50-FPN 1x in the literature (FPN, arXiv 1612.03144; Mask R-CNN,
arXiv 1703.06870; schedules of Detectron). Reading YAML and overrides is `config_file.py`; only `build.py`
turns a config into objects.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]
HeadNorm = Literal["none", "frozen_bn", "bn", "sync_bn", "gn"]
BoxLoss = Literal["l1", "smooth_l1", "giou", "diou", "ciou"]
Protocol = Literal["coco", "voc", "ilsvrc"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class InputConfig(Section):
    """Preprocessing that belongs to the weights, and travels with them."""

    min_size: Count = Field(800, description="short side in pixels that an image is resized to")
    max_size: Count = Field(1333, description="bound in pixels on the long side")
    channel_order: Literal["rgb", "bgr"] = Field("rgb", description="bgr for Caffe and Detectron2 weights")
    mean: tuple[float, float, float] = Field((123.675, 116.28, 103.53), description="per channel, on 0-255")
    std: tuple[Positive, Positive, Positive] = Field((58.395, 57.12, 57.375), description="per channel, on 0-255")
    crop: Count | None = Field(
        None, description="side in pixels of the crop of a classifier or localizer, of the warped regions of a region "
                          "classifier; null: all of the image")
    size_divisor: Count = Field(32, description="the canvas is padded to a multiple of this, in pixels")
    antialias: bool = Field(
        True, description="resize as PIL does; false: plain bilinear on floats, as torchvision's detectors")
    round_down: bool = Field(
        False, description="cut the long side to whole pixels, as torchvision does, which antialias=false implies; "
                           "false: round it, as Detectron2 does")


class BackboneConfig(Section):
    """Networks of arXiv 1512.03385 and what came of them; numbers of stages are the paper's, stage 2 is conv2_x."""

    depth: Annotated[int, Field(ge=8)] = Field(
        50, description="18, 34, 50, 101 or 152 (Table 1); with stem cifar 6n + 2: 20, 32, 44, 56, 110, 1202 (Table 6)")
    width: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        64, description="channels of the stem and of stage 2; 16 in the paper's networks with stem cifar")
    stem: Literal["imagenet", "deep", "cifar"] = Field(
        "imagenet", description="7x7 and max pool; deep: three 3x3 and max pool (ResNet-C and -D, arXiv 1812.01187); "
                                "cifar: one 3x3, three stages (classifiers only)")
    shortcut: Literal["A", "B", "C", "none"] = Field(
        "B", description="section 3.3: where the size changes A pads zeros, B projects; C always projects; none: plain")
    groups: Count = Field(1, description="of the 3x3 in bottlenecks: 32 in ResNeXt-50 32x4d (arXiv 1611.05431)")
    group_width: Count = Field(
        64, description="channels of a group in stage 2 at width 64: 4 in ResNeXt-50 32x4d, 128 in Wide ResNet-50-2")
    preact: bool = Field(False, description="norm and relu before each convolution (arXiv 1603.05027)")
    avg_down: bool = Field(
        False, description="projections average 2x2 instead of taking every other pixel (ResNet-D, arXiv 1812.01187)")
    deform_stages: Annotated[int, Field(ge=0, le=4)] = Field(
        0, description="last stages whose 3x3 are deformable and modulated: 3 in DCNv2 (arXiv 1811.11168)")
    layout: Literal["fpn", "c4", "c5", "dc5", "dc4"] = Field(
        "fpn", description="P2..P6, or P3..P7 (fpn.top); stage 4 at stride 16; stage 5 at stride 32; dilated stage 5 "
                           "at stride 16; dilated stages 4 and 5 at stride 8")
    weights: str | None = Field("imagenet", description="'imagenet' (torchvision's), a path, or null: from scratch")
    norm: Norm = Field("frozen_bn", description="gn trains from scratch at any batch size")
    norm_eps: Annotated[float, Field(ge=0, le=1e-2)] = 1e-5
    stride_in_1x1: bool = Field(False, description="true: the paper and Caffe; false: torchvision")
    freeze_stages: Annotated[int, Field(ge=0, le=5)] = Field(
        2, description="0 none, 1 the stem, 2 stem and stage 2 ...")
    activation_checkpointing: bool = Field(
        False, description="recompute blocks in backward: less memory, about 30 % slower")

    @model_validator(mode="after")
    def _statistics_once(self):
        if self.activation_checkpointing and self.norm in ("bn", "sync_bn"):
            raise ValueError(f"activation_checkpointing must go with norm frozen_bn or gn, got norm={self.norm}: "
                             "recomputation would update its statistics twice a step")
        return self

    @model_validator(mode="after")
    def _network_exists(self):
        if self.stem == "cifar" and self.depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 with stem=cifar (20, 32, 44, 56, 110 ...), got {self.depth}")
        if self.stem != "cifar" and self.depth not in (18, 34, 50, 101, 152):
            raise ValueError(f"depth must be 18, 34, 50, 101 or 152 with stem={self.stem}, got {self.depth}")
        bottleneck = self.depth >= 50 and self.stem != "cifar"
        if bottleneck and self.shortcut == "none":
            raise ValueError("shortcut must be A, B or C in bottlenecks (depth 50 and more; plain networks have depth "
                             f"18 or 34, or stem cifar), got shortcut=none, depth={self.depth}")
        if not bottleneck and (self.groups, self.group_width, self.deform_stages) != (1, 64, 0):
            raise ValueError("groups, group_width and deform_stages must be 1, 64 and 0 without bottlenecks (depth 18 "
                             f"or 34, or stem cifar), got groups={self.groups}, group_width={self.group_width}, "
                             f"deform_stages={self.deform_stages}")
        if self.width * self.group_width % 64:
            raise ValueError("width * group_width must be a multiple of 64, or a group has a part of a channel, got "
                             f"width={self.width}, group_width={self.group_width}")
        if self.avg_down and self.shortcut not in ("B", "C"):
            raise ValueError(f"avg_down must go with projections, shortcut B or C, got shortcut={self.shortcut}")
        if self.preact and self.shortcut not in ("A", "B"):
            raise ValueError(f"preact must go with identities, shortcut A or B, got shortcut={self.shortcut}")
        return self


class FPNConfig(Section):
    channels: Count = 256
    norm: HeadNorm = "none"
    top: Literal["pool", "c5", "p5"] = Field(
        "pool", description="pool: P2..P5, and P6 by taking every other pixel of P5; c5 and p5: P3..P5, and P6 and P7 "
                            "by convolutions that begin from C5 (RetinaNet, arXiv 1708.02002) or P5 (FCOS, 1904.01355)")
    top_relu: bool = Field(True, description="of c5 and p5: relu between P6 and P7; false in MMDetection's RetinaNet")


class AnchorConfig(Section):
    sizes: tuple[tuple[Positive, ...], ...] = Field(
        ((32,), (64,), (128,), (256,), (512,)), description="square roots of areas in pixels, per feature level")
    aspect_ratios: tuple[Positive, ...] = Field((0.5, 1.0, 2.0), description="height / width")
    convention: Literal["detectron2", "torchvision"] = Field(
        "detectron2", description="torchvision rounds base anchors to pixels and takes strides from the grid; points "
                                  "of FCOS are in the middle of their cells, in torchvision in the corner")


class RPNConfig(Section):
    """Faster R-CNN (arXiv 1506.01497) section 3.1, with FPN's numbers of proposals."""

    pre_nms_topk_train: Count = Field(2000, description="per level")
    pre_nms_topk_test: Count = Field(1000, description="per level")
    post_nms_topk_train: Count = Field(1000, description="per image")
    post_nms_topk_test: Count = Field(1000, description="per image")
    convs: Count = Field(1, description="3x3 convolutions of the head; 2 in torchvision's second versions")
    nms_thresh: Probability = 0.7
    min_size: Annotated[float, Field(ge=0)] = Field(
        0.0, description="proposals with a smaller side in pixels are dropped")
    batch_per_image: Count = Field(256, description="anchors sampled for the loss")
    positive_fraction: Probability = 0.5
    fg_iou: Probability = 0.7
    bg_iou: Probability = 0.3
    inside_only: bool = Field(
        False, description="of a detector: train on no anchor that reaches past its image (section 3.3)")
    box_loss: BoxLoss = "l1"
    smooth_l1_beta: Positive = Field(1 / 9, description="used by smooth_l1 only")
    box_loss_weight: Positive = 1.0

    @model_validator(mode="after")
    def _ordered(self):
        if self.bg_iou > self.fg_iou:
            raise ValueError(f"bg_iou must be at most fg_iou, got bg_iou={self.bg_iou}, fg_iou={self.fg_iou}")
        return self


class PoolConfig(Section):
    type: Literal["align", "pool"] = "align"
    sampling_ratio: Annotated[int, Field(ge=0)] = Field(2, description="samples per bin side; 0: one per feature pixel")
    aligned: bool = Field(True, description="half-pixel shift of Detectron2's RoIAlign v2; false: torchvision")
    canonical_side: Positive = Field(
        224.0, description="pixels; square root of the area of regions that belong to P4 (FPN), or that "
                           "eval.test_scales aim at: 224 in both papers, the side of their pre-training's images")


class BoxHeadConfig(Section):
    batch_per_image: Count = Field(512, description="RoIs sampled for the loss")
    positive_fraction: Probability = 0.25
    fg_iou: Probability = 0.5
    resolution: Count = Field(7, description="side of the pooled grid (14 for c4: conv5 halves it)")
    convs: Annotated[int, Field(ge=0)] = Field(
        0, description="3x3 convolutions (unused by c4): 4, with one fc layer, in arXiv 1803.08494, section 4.2")
    fcs: Count = Field(2, description="fc layers after them (unused by c4)")
    fc_dim: Count = Field(1024, description="width of the fc layers (unused by c4)")
    norm: HeadNorm = Field("none", description="after each of the convolutions")
    class_agnostic: bool = Field(False, description="one box per RoI instead of one per class; of a cascade always")
    context: Annotated[int, Field(ge=0)] = Field(
        16, description="region classifiers: pixels of model.input.crop, at each border, that show what surrounds the "
                        "region; 16 of 227 in R-CNN (arXiv 1311.2524, appendix A)")
    global_context: bool = Field(
        False, description="features of the whole image beside those of each RoI (arXiv 1512.03385, appendix B)")
    box_loss: BoxLoss = "l1"
    smooth_l1_beta: Positive = 1.0
    box_loss_weight: Positive = 1.0
    score_thresh: Probability = Field(0.05, description="detections under it are dropped")
    nms_thresh: Probability = Field(0.5, description="arXiv 1512.03385, appendix B, sets 0.3")
    refine: bool = Field(
        False, description="box refinement in detection: pool, score and move once more where each proposal was moved "
                           "to, and keep both predictions (arXiv 1512.03385, appendix B)")
    vote_thresh: Probability | None = Field(
        None, description="box voting: a detection becomes the score-weighted mean of the boxes of its class that "
                          "overlap it by at least this IoU, 0.5 in arXiv 1505.01749; of a localizer, the box "
                          "that the others' scores support most; null: none")
    min_size: Annotated[float, Field(ge=0)] | None = Field(
        None, description="detections with a smaller side in pixels are dropped before NMS, 0.01 in torchvision; null: "
                          "those without area are dropped last, from among the detections_per_image, as in Detectron2")
    detections_per_image: Count = 100


class PointConfig(Section):
    """The points of PointRend (arXiv 1912.08193), sections 3 and 4.1."""

    coarse_fc_dim: Count = Field(1024, description="width of the two fc layers that predict the coarse mask")
    fc_dim: Count = Field(256, description="width of the fc layers that judge a point")
    fcs: Count = 3
    train_points: Count = Field(196, description="per region")
    oversample: Count = Field(3, description="candidates drawn per training point")
    importance: Probability = Field(
        0.75, description="part of the training points that are the most uncertain of the candidates; others are "
                          "anywhere")
    steps: Annotated[int, Field(ge=0)] = Field(5, description="doublings of the coarse mask: 7 to 224 in five")
    step_points: Count = Field(784, description="points computed at each doubling; the others are interpolated")


class MaskHeadConfig(Section):
    """Mask R-CNN (arXiv 1703.06870) section 3.1, Figure 4."""

    type: Literal["fcn", "point_rend"] = Field(
        "fcn", description="point_rend: a coarse mask, refined at points (arXiv 1912.08193; with layout fpn)")
    resolution: Count = Field(
        14, description="side of the pooled grid; masks are twice that, coarse masks of point_rend half")
    channels: Count = 256
    convs: Annotated[int, Field(ge=0)] = Field(
        4, description="of fcn: 3x3 convolutions before the upsampling (0 for c4)")
    norm: HeadNorm = Field("none", description="after each of these")
    paste: Literal["detectron2", "torchvision"] = Field(
        "detectron2", description="how masks fill their boxes; torchvision grows and cuts boxes to whole pixels")
    on_pred_boxes: bool = Field(
        False, description="train masks in the boxes that the box head moves regions to, as Detectron2's PointRend")
    points: PointConfig = PointConfig()

    @model_validator(mode="after")
    def _halves(self):
        if self.type == "point_rend" and self.resolution % 2:
            raise ValueError("resolution must be even with type=point_rend, whose coarse masks have half of it, got "
                             f"{self.resolution}")
        return self


class KeypointHeadConfig(Section):
    """Keypoint R-CNN (arXiv 1703.06870) section 5."""

    num_keypoints: Count = Field(17, description="of an object; as many as the data set names: 17 in COCO")
    resolution: Count = Field(14, description="side of the pooled grid; heatmaps are four times that")
    channels: Count = 512
    convs: Annotated[int, Field(ge=0)] = Field(8, description="3x3 convolutions before the upsampling")
    score: Literal["probability", "logit"] = Field(
        "probability", description="of a keypoint: Detectron2's, relative to the heatmap; torchvision's, the peak")


class CascadeConfig(Section):
    """Cascade R-CNN (arXiv 1712.00726) section 4."""

    ious: tuple[Probability, ...] = Field(
        (0.6, 0.7), description="least IoU of foreground in each stage after the first, whose is box_head.fg_iou")
    average: Literal["probs", "logits"] = Field(
        "probs", description="of the stages, in detection; logits in MMDetection, and their softmax")


class DenseHeadConfig(Section):
    """Heads that judge every place of every level: RetinaNet (arXiv 1708.02002), FCOS (arXiv 1904.01355). Defaults are
    RetinaNet's in Detectron2."""

    convs: Annotated[int, Field(ge=0)] = Field(4, description="3x3 convolutions before each output")
    norm: Literal["none", "gn"] = Field("none", description="after each; gn in FCOS and torchvision's version 2")
    prior: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="probability of each class at the start of training (arXiv 1708.02002, section 3.3)")
    focal_alpha: Probability = Field(0.25, description="weight of the positives; the others have the rest of 1")
    focal_gamma: Annotated[float, Field(ge=0)] = Field(2.0, description="0: plain cross-entropy")
    fg_iou: Probability = Field(0.5, description="of RetinaNet's anchors")
    bg_iou: Probability = Field(0.4, description="of RetinaNet's anchors; between the two they do not train")
    center_radius: Positive = Field(
        1.5, description="FCOS: cells around the middle of an object whose points are its own")
    box_loss: BoxLoss = Field("l1", description="FCOS: giou, diou or ciou")
    smooth_l1_beta: Positive = Field(0.1, description="used by smooth_l1 only")
    box_loss_weight: Positive = 1.0
    normalize: Literal["batch", "image"] = Field(
        "batch", description="what losses are divided by: the positives of the batch, or those of each image, then the "
                             "mean over images (torchvision's RetinaNet)")
    topk: Count = Field(1000, description="best pairs of box and class of a level that go into NMS")
    score_thresh: Probability = Field(0.05, description="detections up to it are dropped")
    nms_thresh: Probability = 0.5
    clip_before_nms: bool = Field(
        False, description="true: torchvision keeps what is clipped to nothing; false: Detectron2 drops it")
    detections_per_image: Count = 100

    @model_validator(mode="after")
    def _ordered(self):
        if self.bg_iou > self.fg_iou:
            raise ValueError(f"bg_iou must be at most fg_iou, got bg_iou={self.bg_iou}, fg_iou={self.fg_iou}")
        return self


class SemanticHeadConfig(Section):
    """Heads of semantic segmentation; null takes what the head's paper, or torchvision, does (models/semantic.py)."""

    channels: Count | None = Field(
        None, description="of the convolutions; null: a fourth of those of stage 5 in fcn, 256 in deeplabv3 and "
                          "deeplabv3_plus, 128 in semantic_fpn and panoptic_fpn")
    norm: Norm | Literal["none"] | None = Field(
        None, description="null: gn in semantic_fpn and panoptic_fpn, bn in the others")
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="null: 0.1 in fcn, 0.5 in deeplabv3 and deeplabv3_plus, 0 in semantic_fpn and panoptic_fpn")
    rates: tuple[Count, ...] | None = Field(
        None, description="deeplabv3 and deeplabv3_plus: dilations of the 3x3 side by side; null: 12, 24, 36 at stride "
                          "8, half of that at 16 (arXiv 1706.05587)")
    loss: Literal["ce", "dice", "lovasz", "ce+dice", "ce+lovasz"] = Field(
        "ce", description="cross-entropy; Dice (V-Net, arXiv 1606.04797); Lovasz-Softmax (arXiv 1705.08790)")
    loss_weight: Positive = Field(1.0, description="0.5 in the panoptic networks of arXiv 1901.02446 and Detectron2")
    aux_weight: Annotated[float, Field(ge=0)] = Field(
        0.5, description="fcn, deeplabv3, deeplabv3_plus: weight of the loss of an FCN head on stage 4, as in "
                         "torchvision; 0: no such head")


class PanopticConfig(Section):
    """How instances and semantic segments become one map (arXiv 1801.00868, section 7); values of Detectron2."""

    score_thresh: Probability = Field(0.5, description="instances under it are left out")
    overlap_thresh: Probability = Field(
        0.5, description="instances of which more than this part is taken by better ones are left out")
    stuff_area: Annotated[int, Field(ge=0)] = Field(4096, description="pixels; smaller stuff segments are void")


# What kinds of models give, by name.
MASKS = {"mask_rcnn", "cascade_mask_rcnn", "panoptic_fpn"}
KEYPOINTS = {"keypoint_rcnn"}
CASCADES = {"cascade_rcnn", "cascade_mask_rcnn"}
RCNNS = {"faster_rcnn", "mask_rcnn", "keypoint_rcnn", *CASCADES}
ALL_LEVELS = {"retinanet", "fcos", "rpn"}  # that read all levels there are; RCNNS pool regions from P2..P5
SEMANTIC = {"fcn", "deeplabv3", "deeplabv3_plus", "semantic_fpn"}  # a class for each pixel, and no objects
PANOPTIC = {"panoptic_fpn"}  # objects, and a class for each pixel: either an object's or one of stuff
# Kinds that differ by heads beside that of boxes: training of one may begin from weights of another.
SAME_BOXES = ({"faster_rcnn", "mask_rcnn", "keypoint_rcnn", "panoptic_fpn"}, CASCADES)


class ModelConfig(Section):
    name: Literal["faster_rcnn", "mask_rcnn", "keypoint_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "retinanet", "fcos",
                  "rpn", "panoptic_fpn", "fcn", "deeplabv3", "deeplabv3_plus", "semantic_fpn", "classifier",
                  "localizer", "region_classifier"] = Field(
        "mask_rcnn", description="rpn: proposals alone; fcn to semantic_fpn: semantic segmentation; localizer and "
                                 "region_classifier: arXiv 1512.03385, appendix C")
    weights: str | None = Field(
        None, description="run, file or published name of weights of a model of this kind that training begins from, "
                          "such as a detector of COCO for VOC; layers of other classes begin anew; null: from "
                          "backbone.weights")
    input: InputConfig = InputConfig()
    backbone: BackboneConfig = BackboneConfig()
    fpn: FPNConfig = FPNConfig()
    anchors: AnchorConfig = AnchorConfig()
    rpn: RPNConfig = RPNConfig()
    pool: PoolConfig = PoolConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()
    keypoint_head: KeypointHeadConfig = KeypointHeadConfig()
    cascade: CascadeConfig = CascadeConfig()
    dense_head: DenseHeadConfig = DenseHeadConfig()
    semantic_head: SemanticHeadConfig = SemanticHeadConfig()
    panoptic: PanopticConfig = PanopticConfig()

    @property
    def has_masks(self) -> bool:
        return self.name in MASKS

    @property
    def has_keypoints(self) -> bool:
        return self.name in KEYPOINTS

    @property
    def is_semantic(self) -> bool:
        return self.name in SEMANTIC

    @property
    def is_panoptic(self) -> bool:
        return self.name in PANOPTIC

    @model_validator(mode="after")
    def _semantic_layouts(self):
        layouts = ()
        if self.name in ("semantic_fpn", "panoptic_fpn"):
            layouts = ("fpn",)
        elif self.is_semantic:
            layouts = ("c5", "dc5", "dc4")
        if layouts and self.backbone.layout not in layouts:
            raise ValueError(f"backbone.layout must be {' or '.join(layouts)} for a {self.name}, got "
                             f"{self.backbone.layout}. Set model.backbone.layout={layouts[-1]}.")
        return self

    @model_validator(mode="after")
    def _detectors_have_four_stages(self):
        if self.backbone.stem == "cifar" and self.name not in ("classifier", "localizer", "region_classifier"):
            raise ValueError("backbone.stem cifar must go with models that read the last stage alone (classifier, "
                             "localizer, region_classifier): others read four stages, and it has three, got "
                             f"name={self.name}")
        if self.name in CASCADES and self.backbone.layout == "c4":
            raise ValueError("backbone.layout must not be c4 for a cascade, each of whose stages would have a conv5 of "
                             f"its own, got name={self.name}. Use fpn, c5 or dc5.")
        if self.has_masks and self.mask_head.type == "point_rend" and self.backbone.layout != "fpn":
            raise ValueError("mask_head.type point_rend must go with backbone.layout fpn, whose finest map it reads, "
                             f"got layout={self.backbone.layout}")
        if self.has_masks and self.mask_head.on_pred_boxes and (self.backbone.layout == "c4" or self.name in CASCADES):
            raise ValueError("mask_head.on_pred_boxes must be false with backbone.layout c4, where masks are made of "
                             "what the box head pooled, and in cascades, got true with "
                             f"layout={self.backbone.layout}, name={self.name}")
        if self.name == "localizer" and self.backbone.layout not in ("c5", "dc5"):
            raise ValueError("backbone.layout must be c5 or dc5 for a localizer, which reads the last stage, got "
                             f"{self.backbone.layout}")
        if self.name == "region_classifier" and self.input.crop is None:
            raise ValueError("input.crop must be given for a region_classifier, whose regions are warped to it, got "
                             "null. Say input.crop=224, as the paper does.")
        if self.name == "region_classifier" and 2 * self.box_head.context >= self.input.crop:
            raise ValueError("box_head.context must be under half of input.crop, which it frames, got "
                             f"context={self.box_head.context}, crop={self.input.crop}. Set model.box_head.context=0.")
        return self

    @model_validator(mode="after")
    def _dense_heads(self):
        if self.fpn.top != "pool" and self.backbone.layout == "fpn" and self.name not in ALL_LEVELS:
            raise ValueError("fpn.top must be pool but for retinanet, fcos and rpn, as regions are pooled from P2..P5, "
                             f"got {self.fpn.top} for name={self.name}")
        if self.name == "fcos" and self.dense_head.box_loss not in ("giou", "diou", "ciou"):
            raise ValueError("dense_head.box_loss must be giou, diou or ciou for fcos, which regresses boxes by their "
                             f"IoU, got {self.dense_head.box_loss}. Set model.dense_head.box_loss=giou.")
        return self

    @model_validator(mode="after")
    def _levels(self):
        levels = 5 if self.backbone.layout == "fpn" else 1
        if not self.is_semantic and len(self.anchors.sizes) != levels:
            raise ValueError(f"anchors.sizes must have one tuple per feature level: {levels} for layout "
                             f"'{self.backbone.layout}', got {len(self.anchors.sizes)}")
        return self


class SourceConfig(Section):
    """A data set: a folder, a YOLO data.yaml, or a COCO annotation file."""

    path: str
    images: str | None = Field(None, description="image folder; null: found beside the annotations")
    split: str | None = Field(None, description="image set within the folder, such as 'train', or a union, "
                                                "'train+val'; null: by role")
    keypoint_offset: float = Field(
        0.0, description="added to x and y of keypoints, in pixels: 0.5 where a file names the pixel that a keypoint "
                         "is in, counted from 0, as COCO's do for Detectron2; results are as the file's")
    shard_cache: str | None = Field(
        None, description="local folder for copies of shards that are far away; null: images are read where they are")
    shard_cache_gb: Positive = Field(100.0, description="size of that folder, in 10^9 bytes: what was not read for "
                                                        "longest is deleted beyond it")


Source = Annotated[SourceConfig, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)]


Range = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]


def _check_range(name: str, value: tuple[float, float] | None) -> None:
    if value is not None and value[0] > value[1]:
        raise ValueError(f"{name} must be a range, got {list(value)}")


class PhotometricConfig(Section):
    """Distorted colours, as SSD trains with (arXiv 1512.02325, section 2.2; numbers of its Caffe code)."""

    probability: Probability = Field(0.5, description="chance of each of brightness, contrast, saturation and hue")
    brightness: Annotated[float, Field(ge=0, le=255)] = Field(32.0, description="largest shift, of 255")
    contrast: Range = Field((0.5, 1.5), description="range of factors")
    saturation: Range = Field((0.5, 1.5), description="range of factors")
    hue: Annotated[float, Field(ge=0, le=180)] = Field(18.0, description="largest turn in degrees")
    channel_order: Probability = Field(0.0, description="chance that R, G and B are exchanged at random")

    @model_validator(mode="after")
    def _ranges(self):
        for name in ("contrast", "saturation"):
            _check_range(name, getattr(self, name))
        return self


class PolicyOpConfig(Section):
    """An operation of AutoAugment (arXiv 1805.09501, table 6)."""

    op: Literal["identity", "auto_contrast", "equalize", "solarize", "posterize", "brightness", "colour", "contrast",
                "sharpness", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"]
    probability: Probability = 1.0
    magnitude: Annotated[float, Field(ge=0, le=10)] = Field(5.0, description="of 10")


class RandAugmentConfig(Section):
    """Operations drawn anew for each image (arXiv 1909.13719)."""

    ops: Count = Field(1, description="operations one after another, N in the paper; 1 in its section on detection")
    magnitude: Annotated[float, Field(ge=0, le=10)] = Field(5.0, description="of 10, M in the paper")


class AffineConfig(Section):
    """A random warp about the middle of the image."""

    probability: Probability = 1.0
    rotate: Annotated[float, Field(ge=0, le=180)] = Field(10.0, description="largest angle in degrees, either way")
    shear: Annotated[float, Field(ge=0, lt=45)] = Field(
        2.0, description="largest angle in degrees, along x and along y; as in YOLOX (arXiv 2107.08430)")
    scale: tuple[Positive, Positive] = Field((0.8, 1.2), description="range of factors")
    translate: Probability = Field(0.1, description="largest shift, as a fraction of each side")

    @model_validator(mode="after")
    def _scale_grows(self):
        _check_range("scale", self.scale)
        return self


class IoUCropConfig(Section):
    """A crop that overlaps an object by a drawn IoU (SSD, arXiv 1512.02325, section 2.2)."""

    min_overlaps: tuple[Probability, ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9), min_length=1,
        description="IoUs of crop and an object, drawn from; as likely as each: no crop, and a crop without constraint")
    scale: tuple[Positive, Positive] = Field(
        (0.3, 1.0), description="range of the sides, as fractions of the image's; 0.1 to 1 of its area in the paper")
    aspect: tuple[Positive, Positive] = Field((0.5, 2.0), description="range of width / height")

    @model_validator(mode="after")
    def _ranges(self):
        _check_range("scale", self.scale)
        _check_range("aspect", self.aspect)
        if self.scale[1] > 1:
            raise ValueError(f"scale must be at most 1, got {list(self.scale)}")
        return self


class CopyPasteConfig(Section):
    """Objects of another image pasted over this one (arXiv 2012.07177). Needs masks."""

    probability: Probability = Field(1.0, description="the paper pastes into every image")
    max_objects: Count = Field(100, description="bound on the objects pasted, of which any number is as likely")


class MosaicConfig(Section):
    """Four images around a random point (YOLOv4, arXiv 2004.10934, section 3.3)."""

    probability: Probability = Field(0.5, description="YOLOX (arXiv 2107.08430) has 1")
    scales: tuple[Positive, Positive] = Field((0.5, 1.0), description="range of factors by which each is resized")
    centre: tuple[Probability, Probability] = Field(
        (0.25, 0.75), description="range of the point, as a fraction of each side; 0.2 to 0.8 in YOLOv4's code")

    @model_validator(mode="after")
    def _ranges(self):
        _check_range("scales", self.scales)
        _check_range("centre", self.centre)
        return self


class MixUpConfig(Section):
    """Two images blended, with the objects of both (arXiv 1710.09412; for detectors arXiv 1902.04103)."""

    probability: Probability = 0.5
    alpha: Positive = Field(1.5, description="of Beta(alpha, alpha), from which the share of this image is drawn: 1.5 "
                                             "in arXiv 1902.04103")


class AugmentConfig(Section):
    """What training does to an image; evaluation only resizes (model.input)."""

    min_sizes: tuple[Count, ...] | None = Field(
        None, description="short sides drawn from, in pixels; null: model.input.min_size times `scales`")
    scales: tuple[Positive, Positive] = Field(
        (1.0, 1.0), description="range of those factors: [0.8, 1.0] is Detectron2's 640 to 800 pixels at any min_size")
    resize: Literal["pillow", "torch"] = Field(
        "pillow", description="who resizes where model.input.antialias is true: Pillow, as in Detectron2; or torch, "
                              "three times as fast, of whose values fewer than 1 in 200 differ, by 1 or 2 of 255")
    flip: Probability = Field(0.5, description="chance of a horizontal flip")
    jitter: tuple[Positive, Positive] | None = Field(
        None, description="large-scale jitter: range of scales, (0.1, 2.0) in arXiv 2012.07177; replaces min_sizes")
    crop_size: Count | None = Field(
        None, description="side in pixels of a random crop that holds the middle of an object; of the square canvas of "
                          "large-scale jitter")
    albumentations: tuple[dict[str, Any], ...] = Field(
        (), description="transforms by name: [{HueSaturationValue: {p: 0.5}}]")
    photometric: PhotometricConfig | None = None
    policy: tuple[tuple[PolicyOpConfig, ...], ...] = Field(
        (), description="lists of operations, of which each image gets one, as in AutoAugment: [[{op: rotate, "
                        "probability: 0.6, magnitude: 4}, {op: equalize}]]")
    rand_augment: RandAugmentConfig | None = None
    affine: AffineConfig | None = None
    iou_crop: IoUCropConfig | None = None
    copy_paste: CopyPasteConfig | None = None
    mosaic: MosaicConfig | None = None
    mixup: MixUpConfig | None = None
    min_visible: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="an object of whose area less than this fraction is left by a transform is dropped; 0.1 in "
                         "YOLOv5")
    mix_until: Probability = Field(
        1.0, description="fraction of the training after which copy-paste, mosaic and mixup stop: 0.95 in YOLOX "
                         "(arXiv 2107.08430: the last 15 of 300 epochs)")

    @model_validator(mode="after")
    def _scales_grow(self):
        _check_range("scales", self.scales)
        return self

    @model_validator(mode="after")
    def _jitter_needs_canvas(self):
        if self.jitter is not None and self.crop_size is None:
            raise ValueError("crop_size must be given with jitter, got null. Say crop_size=1024, as arXiv 2012.07177.")
        return self


class ClassAugmentConfig(Section):
    """What training does to the images of a classifier (arXiv 1512.03385, sections 3.4 and 4.2)."""

    scales: tuple[Count, Count] | None = Field(
        None, description="range in pixels of the short side, drawn from uniformly: [256, 480] in the paper; null: "
                          "model.input.min_size")
    pad: Annotated[int, Field(ge=0)] = Field(0, description="pixels on each side before the random crop (CIFAR: 4)")
    flip: Probability = Field(0.5, description="chance of a horizontal flip")
    pca_colour: Annotated[float, Field(ge=0)] = Field(
        0.0, description="standard deviation of the shifts along ImageNet's principal colours: 0.1 in Krizhevsky et "
                         "al. 2012, section 4.1, which the paper follows; 0: none")

    @model_validator(mode="after")
    def _scales_grow(self):
        if self.scales is not None and self.scales[0] > self.scales[1]:
            raise ValueError(f"scales must be null or a range, got {list(self.scales)}")
        return self


class SamplingConfig(Section):
    """How often each image comes."""

    name: Literal["shuffle", "repeat_factor", "class_balanced"] = Field(
        "shuffle", description="shuffle: once an epoch; repeat_factor: images of rare classes more often (LVIS, arXiv "
                               "1908.03195, section 3); class_balanced: a class drawn uniformly, then one of its "
                               "images (class-aware sampling of arXiv 1512.05830)")
    repeat_thresh: Probability = Field(
        0.001, description="a class in fewer than this fraction of the images is repeated: 0.001 in LVIS")


class DataConfig(Section):
    train: Source | None = None
    val: Source | None = None
    proposals: str | None = Field(
        None, description="run or weights of the localizer whose boxes train a region classifier")
    on_invalid: Literal["error", "drop"] = Field(
        "error", description="what invalid annotations do: stop, or be dropped and counted")
    check_images: bool = Field(
        True, description="read all image files before training: one that cannot be used stops it at once, or is "
                          "dropped; what was found is kept until files change (shards are not read)")
    skip_empty: bool = Field(False, description="train without the images that have no box, or, for keypoints, none "
                                                "that is labelled, as the COCO baselines do")
    aspect_ratio_grouping: bool = Field(True, description="batch wide with wide and tall with tall: less padding")
    shard_window: Count = Field(16, description="shards whose images are shuffled together: those that are read at a "
                                                "time")
    workers: Annotated[int, Field(ge=0)] = Field(2, description="loader processes; 0: in the training process")
    sampling: SamplingConfig = SamplingConfig()
    reduced_decode: bool = Field(False, description="training decodes a JPEG at 1/2, 1/4 or 1/8 of its size where the "
                                                    "resize makes it that small anyway: faster, slightly sharper")
    on_device: bool = Field(False, description="training resizes, crops, mirrors, recolours and draws masks on the "
                                               "device; loader processes only decode: for GPUs that wait for data")
    augment: AugmentConfig = AugmentConfig()
    classification: ClassAugmentConfig = ClassAugmentConfig()


class RPNStepsConfig(Section):
    """What the RPN's two steps of alternating training do otherwise than `train`, whose fields these are; null: no
    other."""

    batch_size: Count | None = None
    reference_batch_size: Count | None = None
    lr: Positive | None = None
    steps: Count | None = None
    milestones: tuple[Count, ...] | None = None


class TrainConfig(Section):
    """lr, steps, milestones and warmup_steps are stated for `reference_batch_size` images a step and scaled by the
    linear rule (arXiv 1706.02677) to `batch_size`: lr by the ratio, steps by its inverse."""

    alternate: bool = Field(False, description="train RPN and heads in turn, in four steps of `steps` each "
                                               "(arXiv 1506.01497, section 3.2); false: together")
    rpn_steps: RPNStepsConfig = RPNStepsConfig()
    batch_size: Count = Field(16, description="images a step, over all processes and accumulated parts")
    reference_batch_size: Count = 16
    lr: Positive = 0.02
    steps: Count = 90_000
    schedule: Literal["multistep", "cosine", "plateau"] = "multistep"
    milestones: tuple[Count, ...] = Field((60_000, 80_000), description="steps at which multistep multiplies lr by 0.1")
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    warmup_factor: Probability = Field(1e-3, description="lr grows linearly from this fraction")
    warmup_until_error: Probability | None = Field(
        None, description="lr stays at that fraction until the training error of a row of the log is under this "
                          "(classifiers); null: warmup_steps")
    plateau_patience: Count = Field(3, description="evaluations without a better keep_best at which plateau "
                                                   "multiplies lr by 0.1")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="sgd only")
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_norm_and_bias: bool = Field(True, description="false: no weight decay on norms and biases")
    grad_clip: Positive | None = Field(None, description="bound on the global L2 norm of the gradient")
    accumulate: Count = Field(1, description="parts a batch is split into, one after another, to save memory")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16 autocast; weights and losses stay fp32")
    channels_last: bool = True
    compile: bool = Field(False, description="torch.compile the backbone")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of averaged weights, which are then evaluated")
    log_every: Count = Field(20, description="steps")
    checkpoint_every: Count = Field(1000, description="steps")
    eval_every: Count | None = Field(None, description="steps; null: at the end only")
    keep_best: str = Field("auto", description="metric of the best checkpoint; auto: panoptic/PQ, keypoints/AP, "
                                               "segm/AP, bbox/AP, voc/AP, ilsvrc/AP, sem_seg/mIoU, "
                                               "box_proposals/AR@1000, cls/top1 or loc/gt_class_error")
    patience: Count | None = Field(None, description="evaluations without a better keep_best before stopping early")
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _consistent(self):
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}")
        if self.schedule == "multistep" and list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must increase, got {self.milestones}")
        return self


class EvalConfig(Section):
    metrics: tuple[Protocol, ...] = Field(
        ("coco",), description="protocols to report of classes of objects; an rpn is measured by its recall")
    batch_size: Count = 1
    crops: Literal[1, 10, "dense"] = Field(
        1, description="test of classifiers (arXiv 1512.03385, section 3.4): centre crop; corners, centre and their "
                       "mirror images; fully convolutional with mirror images, at test_scales")
    test_scales: tuple[Count, ...] | None = Field(
        None, description="multi-scale testing: short sides in pixels, in arXiv 1512.03385 [200, 400, 600, 800, 1000] "
                          "for regions (appendix B) and [224, 256, 384, 480, 640] for classifiers with crops=dense "
                          "(section 3.4); null: model.input.min_size alone")
    test_max_size: Count = Field(2000, description="bound in pixels on the long side at test_scales; "
                                                   "arXiv 1504.08083, section 5.2")

    @model_validator(mode="after")
    def _scales_grow(self):
        scales = self.test_scales
        if scales is not None and (not scales or list(scales) != sorted(set(scales))):
            raise ValueError(f"test_scales must be null or increase, got {list(scales)}")
        return self


class Config(Section):
    output: str = Field("runs/default", description="run folder")
    device: str = Field("auto", description="auto: cuda where there is one, else cpu")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _scales_have_regions(self):
        if self.eval.test_scales is not None and (self.model.name in ALL_LEVELS or self.model.is_semantic):
            raise ValueError("eval.test_scales must be null for retinanet, fcos, rpn and semantic segmentation, which "
                             f"look at an image at one size, got {list(self.eval.test_scales)} for "
                             f"model.name={self.model.name}")
        return self
