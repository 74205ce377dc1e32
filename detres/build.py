"""Config -> objects: the only place that reads the model's config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn

from detres.config import CASCADES, RCNNS, SEMANTIC, MaskHeadConfig, ModelConfig, PanopticConfig, PoolConfig
from detres.models.anchors import AnchorGenerator
from detres.models.backbone import AllStagesBackbone, FPNBackbone, LastStageBackbone
from detres.models.classifier import Classifier
from detres.models.dense_head import DenseHead
from detres.models.faster_rcnn import FasterRCNN, Normalize
from detres.models.fcos import FCOS
from detres.models.localizer import Localizer, PerClassHead
from detres.models.panoptic import PanopticFPN, PanopticSegments, merge_panoptic
from detres.models.proposal_network import ProposalNetwork
from detres.models.region_classifier import RegionClassifier
from detres.models.resnet import ResNet, cifar_resnet, resnet
from detres.models.retinanet import RetinaNet
from detres.models.roi_heads.box_head import BoxPredictor, ConvFCHead
from detres.models.roi_heads.cascade import CascadeRoIHeads
from detres.models.roi_heads.keypoint_head import KeypointHead
from detres.models.roi_heads.mask_head import MaskHead
from detres.models.roi_heads.point_rend import PointRendHead
from detres.models.roi_heads.regions import Pool
from detres.models.roi_heads.standard import RoIHeads
from detres.models.rpn import RPN, RPNHead
from detres.models.semantic import DeepLabV3Head, DeepLabV3PlusHead, FCNHead, SemanticFPNHead, SemanticSegmenter


def build_model(config: ModelConfig, num_classes: int, num_semantic: int = 0) -> nn.Module:
    """A model with random weights; `weights.backbone.load_backbone` fills in those that
    `config.backbone.weights` names.

    num_classes: K, without background; of semantic segmentation all channels, background included if there is one.
    num_semantic: channels of a panoptic model: things as one class, and each class of stuff; 0 for all others.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if config.is_panoptic:
        return build_panoptic_fpn(config, num_classes, num_semantic)
    return MODELS[config.name](config, num_classes)


def build_rcnn(config: ModelConfig, num_classes: int) -> FasterRCNN:
    return FasterRCNN(*rcnn_parts(config, num_classes))


def rcnn_parts(config: ModelConfig, num_classes: int) -> tuple:
    """The arguments of a `FasterRCNN`."""
    backbone, conv5 = build_backbone(config)
    return (build_normalize(config), backbone, build_rpn(config, backbone), build_pool(config.pool, backbone.strides),
            build_roi_heads(config, num_classes, backbone.channels, conv5), config.pool.canonical_side)


def build_rpn(config: ModelConfig, backbone: nn.Module) -> RPN:
    anchors = build_anchors(config, backbone.strides)
    options = config.rpn.model_dump()
    stages = ("pre_nms_topk", "post_nms_topk")
    head = RPNHead(backbone.channels, anchors.per_cell, options.pop("convs"))
    topk = {name: (options.pop(f"{name}_train"), options.pop(f"{name}_test")) for name in stages}
    return RPN(head, anchors, **topk, **options)


def build_proposal_network(config: ModelConfig, num_classes: int) -> ProposalNetwork:
    """One class, "object", whatever num_classes is."""
    backbone, _ = build_backbone(config)
    return ProposalNetwork(build_normalize(config), backbone, build_rpn(config, backbone))


def build_retinanet(config: ModelConfig, num_classes: int) -> RetinaNet:
    backbone, _ = build_backbone(config)
    anchors = build_anchors(config, backbone.strides)
    options = config.dense_head.model_dump(exclude={"center_radius"})
    tower = {name: options.pop(name) for name in ("convs", "norm", "prior")}
    head = DenseHead(backbone.channels, anchors.per_cell, num_classes, bias=tower["norm"] == "none", **tower)
    return RetinaNet(build_normalize(config), backbone, head, anchors, normalize_by=options.pop("normalize"), **options)


def build_fcos(config: ModelConfig, num_classes: int) -> FCOS:
    backbone, _ = build_backbone(config)
    convention = config.anchors.convention
    points = AnchorGenerator([[stride] for stride in backbone.strides], [1.0], backbone.strides, convention,
                             offset=0.5 if convention == "detectron2" else 0.0)
    options = config.dense_head.model_dump(exclude={"fg_iou", "bg_iou", "smooth_l1_beta"})
    tower = {name: options.pop(name) for name in ("convs", "norm", "prior")}
    head = DenseHead(backbone.channels, 1, num_classes, centerness=True, **tower)
    return FCOS(build_normalize(config), backbone, head, points, normalize_by=options.pop("normalize"), **options)


def build_classifier(config: ModelConfig, num_classes: int) -> Classifier:
    return Classifier(build_normalize(config), LastStageBackbone(build_resnet(config)), num_classes)


def build_localizer(config: ModelConfig, num_classes: int) -> Localizer:
    backbone, _ = build_backbone(config)
    anchors = build_anchors(config, backbone.strides)
    head = PerClassHead(backbone.channels, anchors.per_cell, num_classes)
    unused = {"pre_nms_topk_train", "pre_nms_topk_test", "post_nms_topk_train", "post_nms_topk_test", "nms_thresh",
              "inside_only", "convs"}
    return Localizer(build_normalize(config), backbone, head, anchors, topk=config.rpn.pre_nms_topk_test,
                     **config.rpn.model_dump(exclude=unused))


def build_region_classifier(config: ModelConfig, num_classes: int) -> RegionClassifier:
    names = {"context", "batch_per_image", "positive_fraction", "fg_iou", "box_loss", "smooth_l1_beta",
             "box_loss_weight"}
    return RegionClassifier(build_normalize(config), LastStageBackbone(build_resnet(config)), num_classes,
                            side=config.input.crop, **config.box_head.model_dump(include=names))


def build_panoptic_fpn(config: ModelConfig, num_classes: int, num_semantic: int) -> PanopticFPN:
    if num_semantic < 2:
        raise ValueError("num_semantic must be at least 2 for a panoptic model, things and a class of stuff, got "
                         f"{num_semantic}")
    parts = rcnn_parts(config, num_classes)
    head = SemanticFPNHead(parts[1].channels, num_semantic, **semantic_options(config, "channels", "norm", "dropout"))
    options = config.semantic_head
    return PanopticFPN(*parts, semantic_head=head, loss=options.loss, loss_weight=options.loss_weight)


def build_merge(options: PanopticConfig) -> Callable[..., tuple[Tensor, PanopticSegments]]:
    """`merge_panoptic` with its thresholds."""
    return partial(merge_panoptic, **options.model_dump())


def build_segmenter(config: ModelConfig, num_classes: int) -> SemanticSegmenter:
    options = config.semantic_head
    loss = {"loss": options.loss, "loss_weight": options.loss_weight, "aux_weight": options.aux_weight}
    own = semantic_options(config, "channels", "norm", "dropout")
    if config.name == "semantic_fpn":
        backbone, _ = build_backbone(config)
        head = SemanticFPNHead(backbone.channels, num_classes, **own)
        return SemanticSegmenter(build_normalize(config), backbone, head, **loss)
    backbone = AllStagesBackbone(build_resnet(config))
    low, *_, before_last, last = backbone.channels
    atrous = {"stride": backbone.strides[-1], **semantic_options(config, "rates")}
    if config.name == "fcn":
        head = FCNHead(last, num_classes, **own)
    elif config.name == "deeplabv3":
        head = DeepLabV3Head(last, num_classes, **atrous, **own)
    else:
        head = DeepLabV3PlusHead(low, last, num_classes, **atrous, **own)
    aux = None
    if options.aux_weight:
        aux = FCNHead(before_last, num_classes, **semantic_options(config, "norm"), stage=-2)
    return SemanticSegmenter(build_normalize(config), backbone, head, aux, **loss)


def semantic_options(config: ModelConfig, *names: str) -> dict[str, object]:
    """Of the heads of semantic segmentation: those that are given; heads know the others."""
    values = {name: getattr(config.semantic_head, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def build_normalize(config: ModelConfig) -> Normalize:
    options = config.input
    return Normalize(options.mean, options.std, bgr=options.channel_order == "bgr")


def build_anchors(config: ModelConfig, strides: Sequence[int]) -> AnchorGenerator:
    options = config.anchors
    return AnchorGenerator(options.sizes, options.aspect_ratios, strides, options.convention)


def build_resnet(config: ModelConfig) -> ResNet:
    options = config.backbone
    make = cifar_resnet if options.stem == "cifar" else partial(resnet, stem=options.stem)
    body = make(options.depth, width=options.width, shortcut=options.shortcut, norm=options.norm,
                norm_eps=options.norm_eps, stride_in_1x1=options.stride_in_1x1, groups=options.groups,
                group_width=options.group_width, preact=options.preact, avg_down=options.avg_down,
                deform_stages=options.deform_stages, dilated_stages={"dc5": 1, "dc4": 2}.get(options.layout, 0),
                activation_checkpointing=options.activation_checkpointing)
    body.freeze(options.freeze_stages)
    return body


def build_backbone(config: ModelConfig) -> tuple[nn.Module, nn.Module | None]:
    """The feature extractor, and conv5 apart if the layout is c4."""
    options, body = config.backbone, build_resnet(config)
    if options.layout == "fpn":
        return FPNBackbone(body, **config.fpn.model_dump()), None
    conv5 = body.pop_last_stage() if options.layout == "c4" else None
    return LastStageBackbone(body), conv5


def build_roi_heads(config: ModelConfig, num_classes: int, channels: int, conv5: nn.Module | None) -> RoIHeads:
    """channels: of the feature maps; conv5: the per-region part of a C4 detector, else None."""
    options = config.box_head.model_dump(exclude={"context"})  # of region classifiers
    dim, class_agnostic = options.pop("fc_dim"), options.pop("class_agnostic")
    layers = {name: options.pop(name) for name in ("fcs", "convs", "norm")}
    if conv5 is not None:  # conv5 halves the grid; box and mask heads share its map, as the paper's C4 does
        dim = channels * 2
        make_box_head, mask_in, mask_resolution = (lambda: conv5), dim, None
    else:
        make_box_head = partial(ConvFCHead, channels, config.box_head.resolution, dim, **layers)
        mask_in, mask_resolution = channels, config.mask_head.resolution
    mask_head = keypoint_head = None
    if config.has_masks:
        mask_head = build_mask_head(config.mask_head, mask_in, num_classes)
    if config.has_keypoints:
        points = config.keypoint_head
        keypoint_head = KeypointHead(channels, points.num_keypoints, points.channels, points.convs)
    options |= {"num_classes": num_classes, "mask_resolution": mask_resolution, "mask_aligned": config.pool.aligned,
                "mask_paste": config.mask_head.paste, "on_pred_boxes": config.mask_head.on_pred_boxes,
                "keypoint_resolution": config.keypoint_head.resolution, "keypoint_score": config.keypoint_head.score}
    dim *= 2 if config.box_head.global_context else 1
    if config.name in CASCADES:
        heads = [make_box_head() for _ in range(1 + len(config.cascade.ious))]
        predictors = [BoxPredictor(dim, num_classes, class_agnostic=True) for _ in heads]
        return CascadeRoIHeads(heads, predictors, mask_head, **config.cascade.model_dump(), **options)
    predictor = BoxPredictor(dim, num_classes, class_agnostic)
    return RoIHeads(make_box_head(), predictor, mask_head, keypoint_head, **options)


def build_mask_head(config: MaskHeadConfig, in_channels: int, num_classes: int) -> MaskHead | PointRendHead:
    if config.type == "point_rend":
        return PointRendHead(in_channels, num_classes, channels=config.channels, resolution=config.resolution,
                             **config.points.model_dump())
    return MaskHead(in_channels, num_classes, config.channels, config.convs, config.norm)


def build_pool(config: PoolConfig, strides: list[int]) -> Pool:
    """Reads the levels that heads read: P2..P5 of a pyramid (P6 is for the RPN only), or the one there is."""
    return Pool(strides[:4], **config.model_dump())


MODELS = {**dict.fromkeys(RCNNS, build_rcnn), **dict.fromkeys(SEMANTIC, build_segmenter),
          "panoptic_fpn": build_panoptic_fpn, "retinanet": build_retinanet, "fcos": build_fcos,
          "rpn": build_proposal_network, "classifier": build_classifier, "localizer": build_localizer,
          "region_classifier": build_region_classifier}
