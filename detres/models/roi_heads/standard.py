"""Per-region heads of Faster, Mask and Keypoint R-CNN: sampling, losses, decoding.

Heads see the image only through `Regions`, and detection sees the heads only through `Score`: several scales, several
models and a second look at a box are other functions of these two kinds.

Legend: N images, P proposals, R RoIs sampled per image, M rows of the batch that a head runs on, D detections,
K classes, J keypoints, C channels, S side of a pooled grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import MAX_LOG_SCALE, clip, decode, larger_than, take
from detres.models.matching import match_boxes, sample_boxes
from detres.models.roi_heads.keypoint_head import keypoint_cells
from detres.models.roi_heads.mask_head import crop_masks
from detres.models.roi_heads.point_rend import PointRendHead
from detres.models.roi_heads.regions import Regions
from detres.ops.box_voting import vote_boxes
from detres.ops.decode_heatmaps import decode_heatmaps
from detres.ops.nms import nms
from detres.ops.paste_masks import PasteConvention
from detres.structures import Detections, Proposals, Targets

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # as `RoIHeads.score`, of boxes and valid

CANDIDATES = 2048  # the best (box, class) pairs of an image that go into NMS
MIN_SIDE = 1e-2  # pixels; smaller boxes are not looked at again


@dataclass(frozen=True)
class RoIs:
    """Sampled regions; foreground within the first columns."""

    boxes: Tensor  # (N, R, 4)
    labels: Tensor  # (N, R), K is background
    gt_index: Tensor  # (N, R) row of the matched ground truth
    valid: Tensor  # (N, R)


def rows_of(valid: Tensor) -> Tensor:
    """Flat positions (M,) of a padded (N, R) tensor that a head should run on.

    On the CPU exactly the valid ones: nothing to synchronise, and work is dear. On a GPU all, so that shapes
    stay fixed and the host never waits; whoever uses the rows masks by `valid`.
    """
    if valid.is_cuda:
        return torch.arange(valid.numel(), device=valid.device)
    return valid.flatten().nonzero()[:, 0]


class RoIHeads(nn.Module):
    """box_head: (M, C, S, S) -> features (M, dim), or a map (M, C', S', S') that is averaged (conv5 of a C4 detector).
    global_context: box_predictor reads 2 dim features, see `look`. refine: see `look_twice`; vote_thresh: least IoU of
    box voting, None for none, see `ops.box_voting`.
    mask_head: None for Faster R-CNN; mask_resolution None: it reads the map of box_head (C4).
    mask_aligned: how targets are cropped, the same as features are pooled; mask_paste: see `ops.paste_masks`.
    keypoint_head: of Keypoint R-CNN, else None; keypoint_score: see `ops.decode_heatmaps`.
    on_pred_boxes: masks and keypoints are trained in the boxes that the box head moves RoIs to, as they will be in
    detection, not in the RoIs."""

    def __init__(self, box_head: nn.Module, box_predictor: nn.Module, mask_head: nn.Module | None = None,
                 keypoint_head: nn.Module | None = None, *, num_classes: int, resolution: int = 7,
                 mask_resolution: int | None = 14, mask_aligned: bool = True,
                 mask_paste: PasteConvention = "detectron2", on_pred_boxes: bool = False, keypoint_resolution: int = 14,
                 keypoint_score: str = "probability", batch_per_image: int = 512,
                 positive_fraction: float = 0.25, fg_iou: float = 0.5, box_loss: str = "l1",
                 smooth_l1_beta: float = 1.0, box_loss_weight: float = 1.0, score_thresh: float = 0.05,
                 nms_thresh: float = 0.5, min_size: float | None = None, detections_per_image: int = 100,
                 global_context: bool = False, refine: bool = False, vote_thresh: float | None = None):
        super().__init__()
        self.box_head, self.box_predictor = box_head, box_predictor
        self.mask_head, self.keypoint_head = mask_head, keypoint_head
        self.num_classes, self.resolution, self.mask_resolution = num_classes, resolution, mask_resolution
        self.mask_aligned, self.mask_paste, self.on_pred_boxes = mask_aligned, mask_paste, on_pred_boxes
        self.keypoint_resolution, self.keypoint_score = keypoint_resolution, keypoint_score
        self.batch_per_image, self.positive_fraction, self.fg_iou = batch_per_image, positive_fraction, fg_iou
        self.box_loss = {"box_loss": box_loss, "beta": smooth_l1_beta, "box_weight": box_loss_weight}
        self.score_thresh, self.nms_thresh, self.vote_thresh = score_thresh, nms_thresh, vote_thresh
        self.min_size = min_size
        self.detections_per_image, self.global_context, self.refine = detections_per_image, global_context, refine

    @property
    def loss_names(self) -> tuple[str, ...]:
        mask = () if self.mask_head is None else self.mask_head.loss_names
        keypoint = () if self.keypoint_head is None else ("loss_keypoint",)
        return (*self.box_loss_names, *mask, *keypoint)

    @property
    def box_loss_names(self) -> tuple[str, ...]:
        return "loss_cls", "loss_box"

    def look(self, box_head: nn.Module, regions: Regions, boxes: Tensor, image: Tensor,
             sizes: Tensor) -> tuple[Tensor, Tensor]:
        """What box_head makes of boxes (M, 4) in images (M,), and the features that box_predictor reads.

        With global context (arXiv 1512.03385, appendix B) the whole image is one more region, its contents without
        the padding, and the features of each box are followed by those of its image: (M, 2 dim).
        """
        if not self.global_context:
            hidden = box_head(regions(boxes, image, self.resolution))
            return hidden, _vector(hidden)
        n = len(sizes)
        whole = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], 1)  # (N, 4)
        every = torch.arange(n, device=image.device)
        hidden = box_head(regions(torch.cat([boxes, whole.to(boxes)]), torch.cat([image, every]), self.resolution))
        features = _vector(hidden)
        return hidden[:-n], torch.cat([features[:-n], features[-n:][image]], 1)

    # --- training -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, proposals: Proposals, targets: Targets) -> RoIs:
        """Proposals and ground truth (which always matches itself), labelled and sampled."""
        boxes = torch.cat([proposals.boxes, targets.boxes], 1)
        valid = torch.cat([proposals.valid, targets.valid], 1)
        match, gt_index = match_boxes(boxes, targets.boxes, targets.valid, self.fg_iou, self.fg_iou)
        match = torch.where(valid, match, -1)
        index, match = sample_boxes(match, targets.seeds, self.batch_per_image, self.positive_fraction, salt=1)
        gt_index = gt_index.gather(1, index)
        labels = torch.where(match == 1, targets.labels.gather(1, gt_index), self.num_classes)
        return RoIs(take(boxes, index), labels, gt_index, match >= 0)

    def losses(self, regions: Regions, proposals: Proposals, targets: Targets, sizes: Tensor) -> dict[str, Tensor]:
        """sizes (N, 2): height and width of the contents."""
        rois = self.sample(proposals, targets)
        found, rows, hidden, rois = self.box_losses(regions, rois, targets, sizes)
        if self.mask_head is not None:
            found |= self.mask_losses(regions, hidden, rows, rois, targets)
        if self.keypoint_head is not None:
            found |= self.keypoint_losses(regions, rois, targets)
        return found

    def box_losses(self, regions: Regions, rois: RoIs, targets: Targets,
                   sizes: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, RoIs]:
        """Losses; the rows (M,) of the RoIs that box_head ran on, and what it made of them; the RoIs of other heads."""
        found, rows, hidden, deltas = self.stage_losses(self.box_head, self.box_predictor, losses.BOX_WEIGHTS, regions,
                                                        rois, targets, sizes)
        if self.on_pred_boxes:
            moved = move_own(rois.boxes.flatten(0, 1)[rows], deltas, rois.labels.flatten()[rows])
            rois = replace(rois, boxes=padded(moved, rows, rois.valid))
        return found, rows, hidden, rois

    def stage_losses(self, box_head: nn.Module, box_predictor: nn.Module, box_weights: tuple[float, ...],
                     regions: Regions, rois: RoIs, targets: Targets,
                     sizes: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """What `box_losses` gives, of one head and predictor, and the deltas (M, K or 1, 4)."""
        gt_boxes = take(targets.boxes, rois.gt_index).flatten(0, 1)
        rows = rows_of(rois.valid)
        boxes, labels, valid = rois.boxes.flatten(0, 1)[rows], rois.labels.flatten()[rows], rois.valid.flatten()[rows]
        hidden, features = self.look(box_head, regions, boxes, rows // rois.valid.shape[1], sizes)
        logits, deltas = box_predictor(features)
        found = losses.box_head_losses(logits, deltas, boxes, gt_boxes[rows], labels, valid, box_weights=box_weights,
                                       **self.box_loss)
        return found, rows, hidden, deltas

    def mask_losses(self, regions: Regions, hidden: Tensor, rows: Tensor, rois: RoIs,
                    targets: Targets) -> dict[str, Tensor]:
        """Masks are trained on the foreground RoIs."""
        positive = self._positive(rois)
        columns = positive.shape[1]
        chosen = rows_of(positive)
        image = chosen // columns
        flat = image * rois.valid.shape[1] + chosen % columns  # the same rows in (N, R)
        boxes, labels = rois.boxes.flatten(0, 1)[flat], rois.labels.flatten()[flat]
        positive = positive.flatten()[chosen]
        gt_row = rois.gt_index.flatten()[flat] + image * targets.valid.shape[1]
        mask_row = (targets.valid.flatten().cumsum(0) - 1).clamp(min=0)[gt_row]
        if isinstance(self.mask_head, PointRendHead):
            return self.mask_head.losses(regions, boxes, image, labels, positive, targets.masks, mask_row,
                                         targets.seeds[image], chosen % columns)
        pooled = hidden[torch.searchsorted(rows, flat)] if self.mask_resolution is None else \
            regions(boxes, image, self.mask_resolution)
        logits = self.mask_head(pooled)
        cropped = crop_masks(targets.masks, mask_row, boxes, logits.shape[-1], self.mask_aligned)
        return losses.mask_loss(logits, cropped, labels, positive)

    def keypoint_losses(self, regions: Regions, rois: RoIs, targets: Targets) -> dict[str, Tensor]:
        """Keypoints are trained on the foreground RoIs that have a labelled one inside: others would add nothing."""
        positive = self._positive(rois)
        columns = positive.shape[1]
        image = torch.arange(len(positive), device=positive.device)[:, None]
        boxes = rois.boxes[:, :columns]
        cells, seen = keypoint_cells(targets.keypoints[image, rois.gt_index[:, :columns]], boxes,
                                     self.keypoint_head.side(self.keypoint_resolution))  # (N, R', J)
        seen = seen & positive[..., None]
        chosen = rows_of(seen.any(-1))
        pooled = regions(boxes.flatten(0, 1)[chosen], chosen // columns, self.keypoint_resolution)
        return losses.keypoint_loss(self.keypoint_head(pooled), cells.flatten(0, 1)[chosen],
                                    seen.flatten(0, 1)[chosen])

    def _positive(self, rois: RoIs) -> Tensor:
        """Which RoIs are foreground (N, R'), of the first columns: it is all within these."""
        columns = max(1, int(rois.valid.shape[1] * self.positive_fraction))
        return ((rois.labels < self.num_classes) & rois.valid)[:, :columns]

    # --- inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, regions: Regions, boxes: Tensor, valid: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """What boxes (N, P, 4) hold: probabilities (N, P, K) of the foreground classes, and deltas (N, P, K or 1, 4),
        which say how far a box may grow: `move` sets no limit, as a cascade has one for each stage.

        valid (N, P); sizes (N, 2): height and width of the contents. What is not valid may hold anything.
        """
        logits, deltas = self.stage_outputs(self.box_head, self.box_predictor, regions, boxes, valid, sizes)
        growth = MAX_LOG_SCALE * losses.BOX_WEIGHTS[2]
        return logits.softmax(-1)[..., :-1], torch.cat([deltas[..., :2], deltas[..., 2:].clamp(max=growth)], -1)

    def stage_outputs(self, box_head: nn.Module, box_predictor: nn.Module, regions: Regions, boxes: Tensor,
                     valid: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, P, K + 1), background last, and deltas (N, P, K or 1, 4) of one head and predictor, fp32."""
        rows = rows_of(valid)
        _, features = self.look(box_head, regions, boxes.flatten(0, 1)[rows], rows // valid.shape[1], sizes)
        logits, deltas = box_predictor(features)
        return padded(logits.float(), rows, valid), padded(deltas.float(), rows, valid)

    @torch.no_grad()
    def detect(self, score: Score, proposals: Proposals, sizes: Tensor) -> Detections:
        """Detections without masks and keypoints. sizes (N, 2): height and width of the contents, which boxes are
        clipped to."""
        boxes, valid = proposals.boxes, proposals.valid
        seen = look_twice(score, boxes, valid, sizes) if self.refine else (*score(boxes, valid), boxes, valid)
        return self.select(*seen, sizes)

    def select(self, probs: Tensor, deltas: Tensor, boxes: Tensor, valid: Tensor, sizes: Tensor) -> Detections:
        """Threshold, decode, clip, NMS within a class, the best of all classes, box voting; without boxes that are
        clipped to nothing, see `config.BoxHeadConfig.min_size`.

        probs (N, P, K) and deltas (N, P, K or 1, 4) of boxes (N, P, 4), valid (N, P). Only the best `CANDIDATES` pairs
        of an image enter NMS, which is exact as long as `detections_per_image` of them survive it; they alone vote.
        """
        probs = torch.where((probs > self.score_thresh) & valid[..., None], probs, -1.0).flatten(1)
        scores, index = probs.topk(min(CANDIDATES, probs.shape[1]), dim=1)  # (N, c)
        proposal, labels = index // self.num_classes, index % self.num_classes
        image = torch.arange(len(probs), device=probs.device)[:, None]
        boxes = move(boxes, deltas, proposal, labels, sizes)
        valid = scores > 0
        if self.min_size is not None:
            valid &= larger_than(boxes, self.min_size)
        kept = torch.where(nms(boxes, scores, valid, self.nms_thresh, groups=labels), scores, -1.0)
        kept, best = kept.topk(min(self.detections_per_image, kept.shape[1]), dim=1)  # (N, D)
        found, classes = boxes[image, best], labels[image, best]
        if self.vote_thresh is not None:
            found = vote_boxes(found, classes, boxes, labels, torch.where(valid, scores, 0.0), self.vote_thresh)
        valid = (kept > 0) & larger_than(found, 0)
        return Detections(boxes=torch.where(valid[..., None], found, 0.0), scores=torch.where(valid, kept, 0.0),
                          labels=torch.where(valid, classes, 0), valid=valid, paste=self.mask_paste)

    @torch.no_grad()
    def predict_masks(self, regions: Regions, found: Detections) -> Tensor:
        """Probabilities (N, D, S, S) inside the detected boxes; zero where there is no detection."""
        n, d = found.valid.shape
        rows = rows_of(found.valid)
        boxes, labels = found.boxes.flatten(0, 1)[rows], found.labels.flatten()[rows]
        if isinstance(self.mask_head, PointRendHead):
            own = self.mask_head.predict(regions, boxes, rows // d, labels)
        else:
            pooled = regions(boxes, rows // d, self.mask_resolution or self.resolution)
            logits = self.mask_head(self.box_head(pooled) if self.mask_resolution is None else pooled)
            own = logits[torch.arange(len(rows), device=rows.device), labels].float().sigmoid()
        return padded(own, rows, found.valid) * found.valid[..., None, None]

    @torch.no_grad()
    def predict_heatmaps(self, regions: Regions, found: Detections) -> Tensor:
        """Logits (N, D, J, S', S') of where in its box each keypoint of a detection is; zero where there is none."""
        rows = rows_of(found.valid)
        pooled = regions(found.boxes.flatten(0, 1)[rows], rows // found.valid.shape[1], self.keypoint_resolution)
        return padded(self.keypoint_head(pooled), rows, found.valid)

    @torch.no_grad()
    def locate_keypoints(self, heatmaps: Tensor, found: Detections, size: tuple[int, int]) -> Tensor:
        """Keypoints (N, D, J, 3) at the peaks of heatmaps (N, D, J, S', S'). size: height and width of the canvas."""
        rows = rows_of(found.valid)
        points = decode_heatmaps(heatmaps.flatten(0, 1)[rows], found.boxes.flatten(0, 1)[rows], size,
                                 self.keypoint_score)
        return torch.where(found.valid[..., None, None], padded(points, rows, found.valid), 0.0)


def padded(values: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """Values (M, ...) at `rows_of(valid)` put back where they belong: (N, R, ...), zero elsewhere."""
    whole = values.new_zeros(valid.numel(), *values.shape[1:])
    return whole.index_copy_(0, rows, values).view(*valid.shape, *values.shape[1:])


def look_twice(score: Score, boxes: Tensor, valid: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Box refinement (arXiv 1512.03385, appendix B): the P proposals, then the P boxes that they were moved to, with
    what `score` says of both: probs (N, 2P, K), deltas (N, 2P, K or 1, 4), boxes (N, 2P, 4), valid (N, 2P).

    The paper makes 300 new predictions out of 300 proposals, and does not say to which class's box each is moved. Here:
    to the box of its most probable foreground class, as the classes of a softmax compete for a region. One new region a
    proposal keeps work and memory at twice those of detection, whatever K; like every region, a new one is scored
    and moved for all classes. (arXiv 1505.01749 moves the boxes of each class by themselves.)
    """
    probs, deltas = score(boxes, valid)
    every = torch.arange(boxes.shape[1], device=boxes.device).expand(valid.shape)
    moved = move(boxes, deltas, every, probs.argmax(-1), sizes)
    still_valid = valid & larger_than(moved, MIN_SIDE)
    first, second = (probs, deltas, boxes, valid), (*score(moved, still_valid), moved, still_valid)
    return tuple(torch.cat(pair, 1) for pair in zip(first, second))


def move(boxes: Tensor, deltas: Tensor, index: Tensor, labels: Tensor, sizes: Tensor) -> Tensor:
    """Rows `index` (N, c) of boxes (N, P, 4), moved by their deltas (N, P, K or 1, 4) for classes (N, c), clipped."""
    image = torch.arange(len(index), device=index.device)[:, None]
    own = deltas[image, index, labels.clamp(max=deltas.shape[2] - 1)]
    return clip(decode(own, boxes[image, index], losses.BOX_WEIGHTS, limit=math.inf), sizes)


@torch.no_grad()
def move_own(boxes: Tensor, deltas: Tensor, labels: Tensor) -> Tensor:
    """Boxes (M, 4), moved by their deltas (M, K or 1, 4) for classes (M,) 0..K; of background by any."""
    own = deltas[torch.arange(len(labels), device=labels.device), labels.clamp(max=deltas.shape[1] - 1)]
    return decode(own.float(), boxes, losses.BOX_WEIGHTS)


def _vector(hidden: Tensor) -> Tensor:
    return hidden.mean((2, 3)) if hidden.dim() == 4 else hidden
