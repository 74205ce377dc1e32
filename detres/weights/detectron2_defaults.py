"""Detectron2's settings and what they are where a file does not say (its detectron2/config/defaults.py, version 2)."""

from __future__ import annotations

from typing import Any

SECTIONS: dict[str, dict[str, Any]] = {
    "": {"CUDNN_BENCHMARK": False, "FLOAT32_PRECISION": "", "OUTPUT_DIR": "./output", "SEED": -1, "VERSION": 2,
        "VIS_PERIOD": 0},
    "DATALOADER": {"ASPECT_RATIO_GROUPING": True, "FILTER_EMPTY_ANNOTATIONS": True, "NUM_WORKERS": 4,
        "REPEAT_SQRT": True, "REPEAT_THRESHOLD": 0.0, "SAMPLER_TRAIN": "TrainingSampler"},
    "DATASETS": {"PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000, "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
        "PROPOSAL_FILES_TEST": [], "PROPOSAL_FILES_TRAIN": [], "TEST": [], "TRAIN": []},
    "GLOBAL": {"HACK": 1.0},
    "INPUT": {"FORMAT": "BGR", "MASK_FORMAT": "polygon", "MAX_SIZE_TEST": 1333, "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800, "MIN_SIZE_TRAIN": [800], "MIN_SIZE_TRAIN_SAMPLING": "choice",
        "RANDOM_FLIP": "horizontal"},
    "INPUT.CROP": {"ENABLED": False, "SIZE": [0.9, 0.9], "TYPE": "relative_range"},
    "MODEL": {"DEVICE": "cuda", "KEYPOINT_ON": False, "LOAD_PROPOSALS": False, "MASK_ON": False,
        "META_ARCHITECTURE": "GeneralizedRCNN", "PIXEL_MEAN": [103.53, 116.28, 123.675], "PIXEL_STD": [1.0, 1.0, 1.0],
        "WEIGHTS": ""},
    "MODEL.ANCHOR_GENERATOR": {"ANGLES": [[-90, 0, 90]], "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
        "NAME": "DefaultAnchorGenerator", "OFFSET": 0.0, "SIZES": [[32, 64, 128, 256, 512]]},
    "MODEL.BACKBONE": {"FREEZE_AT": 2, "NAME": "build_resnet_backbone"},
    "MODEL.FPN": {"FUSE_TYPE": "sum", "IN_FEATURES": [], "NORM": "", "OUT_CHANNELS": 256},
    "MODEL.PANOPTIC_FPN": {"INSTANCE_LOSS_WEIGHT": 1.0},
    "MODEL.PANOPTIC_FPN.COMBINE": {"ENABLED": True, "INSTANCES_CONFIDENCE_THRESH": 0.5, "OVERLAP_THRESH": 0.5,
        "STUFF_AREA_LIMIT": 4096},
    "MODEL.PROPOSAL_GENERATOR": {"MIN_SIZE": 0, "NAME": "RPN"},
    "MODEL.RESNETS": {"DEFORM_MODULATED": False, "DEFORM_NUM_GROUPS": 1,
        "DEFORM_ON_PER_STAGE": [False, False, False, False], "DEPTH": 50, "NORM": "FrozenBN", "NUM_GROUPS": 1,
        "OUT_FEATURES": ["res4"], "RES2_OUT_CHANNELS": 256, "RES5_DILATION": 1, "STEM_OUT_CHANNELS": 64,
        "STRIDE_IN_1X1": True, "WIDTH_PER_GROUP": 64},
    "MODEL.RETINANET": {"BBOX_REG_LOSS_TYPE": "smooth_l1", "BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0],
        "FOCAL_LOSS_ALPHA": 0.25, "FOCAL_LOSS_GAMMA": 2.0, "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
        "IOU_LABELS": [0, -1, 1], "IOU_THRESHOLDS": [0.4, 0.5], "NMS_THRESH_TEST": 0.5, "NORM": "", "NUM_CLASSES": 80,
        "NUM_CONVS": 4, "PRIOR_PROB": 0.01, "SCORE_THRESH_TEST": 0.05, "SMOOTH_L1_LOSS_BETA": 0.1,
        "TOPK_CANDIDATES_TEST": 1000},
    "MODEL.ROI_BOX_CASCADE_HEAD": {
        "BBOX_REG_WEIGHTS": [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.0, 30.0, 15.0, 15.0]],
        "IOUS": [0.5, 0.6, 0.7]},
    "MODEL.ROI_BOX_HEAD": {"BBOX_REG_LOSS_TYPE": "smooth_l1", "BBOX_REG_LOSS_WEIGHT": 1.0,
        "BBOX_REG_WEIGHTS": [10.0, 10.0, 5.0, 5.0], "CLS_AGNOSTIC_BBOX_REG": False, "CONV_DIM": 256, "FC_DIM": 1024,
        "FED_LOSS_FREQ_WEIGHT_POWER": 0.5, "FED_LOSS_NUM_CLASSES": 50, "NAME": "", "NORM": "", "NUM_CONV": 0,
        "NUM_FC": 0, "POOLER_RESOLUTION": 14, "POOLER_SAMPLING_RATIO": 0, "POOLER_TYPE": "ROIAlignV2",
        "SMOOTH_L1_BETA": 0.0, "TRAIN_ON_PRED_BOXES": False, "USE_FED_LOSS": False, "USE_SIGMOID_CE": False},
    "MODEL.ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 512, "IN_FEATURES": ["res4"], "IOU_LABELS": [0, 1],
        "IOU_THRESHOLDS": [0.5], "NAME": "Res5ROIHeads", "NMS_THRESH_TEST": 0.5, "NUM_CLASSES": 80,
        "POSITIVE_FRACTION": 0.25, "PROPOSAL_APPEND_GT": True, "SCORE_THRESH_TEST": 0.05},
    "MODEL.ROI_KEYPOINT_HEAD": {"CONV_DIMS": [512, 512, 512, 512, 512, 512, 512, 512], "LOSS_WEIGHT": 1.0,
        "MIN_KEYPOINTS_PER_IMAGE": 1, "NAME": "KRCNNConvDeconvUpsampleHead",
        "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True, "NUM_KEYPOINTS": 17, "POOLER_RESOLUTION": 14,
        "POOLER_SAMPLING_RATIO": 0, "POOLER_TYPE": "ROIAlignV2"},
    "MODEL.ROI_MASK_HEAD": {"CLS_AGNOSTIC_MASK": False, "CONV_DIM": 256, "NAME": "MaskRCNNConvUpsampleHead", "NORM": "",
        "NUM_CONV": 0, "POOLER_RESOLUTION": 14, "POOLER_SAMPLING_RATIO": 0, "POOLER_TYPE": "ROIAlignV2"},
    "MODEL.RPN": {"BATCH_SIZE_PER_IMAGE": 256, "BBOX_REG_LOSS_TYPE": "smooth_l1", "BBOX_REG_LOSS_WEIGHT": 1.0,
        "BBOX_REG_WEIGHTS": [1.0, 1.0, 1.0, 1.0], "BOUNDARY_THRESH": -1, "CONV_DIMS": [-1],
        "HEAD_NAME": "StandardRPNHead", "IN_FEATURES": ["res4"], "IOU_LABELS": [0, -1, 1], "IOU_THRESHOLDS": [0.3, 0.7],
        "LOSS_WEIGHT": 1.0, "NMS_THRESH": 0.7, "POSITIVE_FRACTION": 0.5, "POST_NMS_TOPK_TEST": 1000,
        "POST_NMS_TOPK_TRAIN": 2000, "PRE_NMS_TOPK_TEST": 6000, "PRE_NMS_TOPK_TRAIN": 12000, "SMOOTH_L1_BETA": 0.0},
    "MODEL.SEM_SEG_HEAD": {"COMMON_STRIDE": 4, "CONVS_DIM": 128, "IGNORE_VALUE": 255,
        "IN_FEATURES": ["p2", "p3", "p4", "p5"], "LOSS_WEIGHT": 1.0, "NAME": "SemSegFPNHead", "NORM": "GN",
        "NUM_CLASSES": 54},
    "SOLVER": {"BASE_LR": 0.001, "BASE_LR_END": 0.0, "BIAS_LR_FACTOR": 1.0, "CHECKPOINT_PERIOD": 5000, "GAMMA": 0.1,
        "IMS_PER_BATCH": 16, "LR_SCHEDULER_NAME": "WarmupMultiStepLR", "MAX_ITER": 40000, "MOMENTUM": 0.9,
        "NESTEROV": False, "NUM_DECAYS": 3, "REFERENCE_WORLD_SIZE": 0, "RESCALE_INTERVAL": False, "STEPS": [30000],
        "WARMUP_FACTOR": 0.001, "WARMUP_ITERS": 1000, "WARMUP_METHOD": "linear", "WEIGHT_DECAY": 0.0001,
        "WEIGHT_DECAY_BIAS": None, "WEIGHT_DECAY_NORM": 0.0},
    "SOLVER.AMP": {"ENABLED": False},
    "SOLVER.CLIP_GRADIENTS": {"CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "ENABLED": False, "NORM_TYPE": 2.0},
    "TEST": {"DETECTIONS_PER_IMAGE": 100, "EVAL_PERIOD": 0, "EXPECTED_RESULTS": [], "KEYPOINT_OKS_SIGMAS": []},
    "TEST.AUG": {"ENABLED": False, "FLIP": True, "MAX_SIZE": 4000,
        "MIN_SIZES": [400, 500, 600, 700, 800, 900, 1000, 1100, 1200]},
    "TEST.PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
}
DEFAULTS = {f"{section}.{name}".lstrip("."): value for section, values in SECTIONS.items()
            for name, value in values.items()}

# Files that its configs name as `_BASE_` (its configs/), for a config that comes alone.
_COCO = {
    "DATASETS": {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"]},
    "SOLVER": {"IMS_PER_BATCH": 16, "BASE_LR": 0.02, "STEPS": [60000, 80000], "MAX_ITER": 90000},
    "INPUT": {"MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800]},
}
_HEADS = {
    "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
    "ROI_MASK_HEAD": {"NAME": "MaskRCNNConvUpsampleHead", "NUM_CONV": 4, "POOLER_RESOLUTION": 14},
}
BASES: dict[str, dict[str, Any]] = {
    "Base-RCNN-C4.yaml": {**_COCO, "MODEL": {
        "RPN": {"PRE_NMS_TOPK_TEST": 6000, "POST_NMS_TOPK_TEST": 1000}, "ROI_HEADS": {"NAME": "Res5ROIHeads"}}},
    "Base-RCNN-DilatedC5.yaml": {**_COCO, "MODEL": {
        **_HEADS, "RESNETS": {"OUT_FEATURES": ["res5"], "RES5_DILATION": 2},
        "RPN": {"IN_FEATURES": ["res5"], "PRE_NMS_TOPK_TEST": 6000, "POST_NMS_TOPK_TEST": 1000},
        "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["res5"]}}},
    "Base-RCNN-FPN.yaml": {**_COCO, "MODEL": {
        **_HEADS, "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
        "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]},
        "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
        "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
        "RPN": {"IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "PRE_NMS_TOPK_TRAIN": 2000, "PRE_NMS_TOPK_TEST": 1000,
                "POST_NMS_TOPK_TRAIN": 1000, "POST_NMS_TOPK_TEST": 1000},
        "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": ["p2", "p3", "p4", "p5"]}}},
    "Base-RetinaNet.yaml": {**_COCO, "SOLVER": {**_COCO["SOLVER"], "BASE_LR": 0.01}, "MODEL": {
        "META_ARCHITECTURE": "RetinaNet", "BACKBONE": {"NAME": "build_retinanet_resnet_fpn_backbone"},
        "RESNETS": {"OUT_FEATURES": ["res3", "res4", "res5"]}, "FPN": {"IN_FEATURES": ["res3", "res4", "res5"]},
        "ANCHOR_GENERATOR": {"SIZES": [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]},
        "RETINANET": {"SMOOTH_L1_LOSS_BETA": 0.0}}},
    "Base-Keypoint-RCNN-FPN.yaml": {"_BASE_": "Base-RCNN-FPN.yaml", "MODEL": {
        "KEYPOINT_ON": True, "ROI_HEADS": {"NUM_CLASSES": 1}, "ROI_BOX_HEAD": {"SMOOTH_L1_BETA": 0.5},
        "RPN": {"POST_NMS_TOPK_TRAIN": 1500}},
        "DATASETS": {"TRAIN": ["keypoints_coco_2017_train"], "TEST": ["keypoints_coco_2017_val"]}},
    "Base-Panoptic-FPN.yaml": {"_BASE_": "Base-RCNN-FPN.yaml", "MODEL": {
        "META_ARCHITECTURE": "PanopticFPN", "MASK_ON": True, "SEM_SEG_HEAD": {"LOSS_WEIGHT": 0.5}},
        "DATASETS": {"TRAIN": ["coco_2017_train_panoptic_separated"], "TEST": ["coco_2017_val_panoptic_separated"]},
        "DATALOADER": {"FILTER_EMPTY_ANNOTATIONS": False}},
}
