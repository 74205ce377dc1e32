"""Training that begins from a trained model rather than from a backbone: `model.weights`, of any toolkit.

So arXiv 1512.03385 (appendix B, "PASCAL VOC") fine-tunes its COCO detector on PASCAL VOC. Layers that tell classes
apart begin anew where the classes are others, but for the rows of classes that both have, by name. Heads beside the
one of boxes may be more or fewer (`config.SAME_BOXES`): a Faster R-CNN begins from a Mask R-CNN, and the other way
round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from detres.config import Config, ModelConfig
from detres.engine.checkpoint import WeightsMeta
from detres.weights.importers import Weights, read_weights
from detres.weights.mismatch import OF_CLASSES, check_fit
from detres.weights.source import shapes_of


@dataclass(frozen=True)
class Rows:
    """How a layer's outputs belong to classes."""

    per_class: int | None = 1  # outputs of a class; None: any number
    background: bool = False  # one class more, the last
    innermost: bool = False  # classes within anchors, instead of outputs within classes
    semantic: bool = False  # classes of a panoptic model's pixels


# By what the names of layers begin with. Layers that depend on classes and are not here begin anew.
LAYERS = {
    r"roi_heads\.box_predictor(\.\d+)?\.cls\.": Rows(background=True),
    r"roi_heads\.box_predictor(\.\d+)?\.box\.": Rows(per_class=4),
    r"roi_heads\.mask_head\.predict\.": Rows(),
    r"roi_heads\.mask_head\.coarse_head\.predict\.": Rows(per_class=None),
    r"semantic_head\.predict\.": Rows(semantic=True),
    r"(aux_)?head\.predict\.": Rows(),
    r"fc\.|cls\.": Rows(),
    r"box\.": Rows(per_class=4),
    r"head\.cls\.": Rows(per_class=None, innermost=True),
    r"head\.box\.": Rows(per_class=0),  # of a dense head: none are of a class
}
OF_LOCALIZERS = {r"head\.(cls|box)\.": Rows(per_class=None)}
HEADS = {"roi_heads.mask_head.": "mask head", "roi_heads.keypoint_head.": "keypoint head",
         "semantic_head.": "semantic head"}  # that kinds of models differ by
OF_KEYPOINTS = "roi_heads.keypoint_head.deconv."
CONVENTIONS = (("input", "channel_order"), ("input", "mean"), ("input", "std"), ("backbone", "stride_in_1x1"),
               ("backbone", "norm_eps"), ("anchors", "convention"), ("anchors", "sizes"), ("pool", "aligned"))


def load_start(model: nn.Module, source: str, classes: Sequence[str], semantic_classes: Sequence[str] = (),
               config: ModelConfig | None = None) -> str:
    """Put the weights of a model of the same kind, but for `HEADS`, into `model`, which is to learn `classes`. Says
    what it did, and what `config`, the model's, does otherwise than that of the weights.

    source: as in `read_weights`. Raises as that, and WeightsMismatch if tensors do not fit.
    """
    weights, own = read_weights(source), model.state_dict()
    tensors, told = _with_heads_of(own, refit(weights, own, classes, semantic_classes))
    title = f"model.weights must be of a model of the same kind ({weights.file})"
    check_fit(shapes_of(tensors), shapes_of(own), title,
              "Train with the model section that the weights carry: weights=... instead of model.weights.")
    model.load_state_dict(tensors)
    others = [] if config is None else _conventions(Config.model_validate(weights.meta.config).model, config)
    return "; ".join([tell_kept(weights.meta, classes, semantic_classes), *told, *others, *weights.notes])


def _conventions(theirs: ModelConfig, own: ModelConfig) -> list[str]:
    """Those in which the models differ, in words: no shape shows them, and features would be others."""
    a, b = theirs.model_dump(), own.model_dump()
    fields = [field for field in CONVENTIONS if own.backbone.depth >= 50 or field != ("backbone", "stride_in_1x1")]
    different = [f"{section}.{name} {b[section][name]}, theirs is {a[section][name]}" for section, name in fields
                 if a[section][name] != b[section][name]]
    return [f"this model has {', '.join(different)}: say weights=... instead of model.weights for a model as theirs"
            ] if different else []


def _with_heads_of(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`theirs` with the heads that `own` has, whose new ones begin as they are; and what that changed, in words.

    Frozen batch norms have no counter, which nothing depends on: which of them are frozen may differ, too.
    """
    tensors, told = dict(theirs), []
    for head, title in HEADS.items():
        has, wants = (any(name.startswith(head) for name in state) for state in (theirs, own))
        if has and not wants:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(head)}
            told.append(f"their {title} is left out")
        if wants and not has:
            tensors |= {name: tensor for name, tensor in own.items() if name.startswith(head)}
            told.append(f"the {title} begins anew, as they have none")
    if any(name.startswith(OF_KEYPOINTS) and tensor.shape != own[name].shape for name, tensor in tensors.items()):
        tensors |= {name: tensor for name, tensor in own.items() if name.startswith(OF_KEYPOINTS)}
        told.append("the layer of keypoints begins anew, as their number differs")
    counters = {name for state in (theirs, own) for name in state if name.endswith("num_batches_tracked")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in counters}
    return tensors | {name: own[name] for name in counters if name in own}, told


def refit(weights: Weights, own: Mapping[str, Tensor], classes: Sequence[str],
          semantic_classes: Sequence[str] = ()) -> dict[str, Tensor]:
    """Tensors for a model of other classes, whose own initial ones are `own`."""
    meta = weights.meta
    if _same(meta, classes, semantic_classes):
        return weights.tensors
    layers = OF_LOCALIZERS if meta.config.get("model", {}).get("name") == "localizer" else LAYERS
    found = dict(weights.tensors)
    for name, tensor in weights.tensors.items():
        if not OF_CLASSES.match(name) or name not in own:
            continue
        rows = next((rows for pattern, rows in layers.items() if re.match(pattern, name)), None)
        lists = (meta.semantic_classes, semantic_classes) if rows and rows.semantic else (meta.classes, classes)
        found[name] = own[name] if rows is None else _kept(tensor, own[name], rows, *map(tuple, lists))
    return found


def _kept(theirs: Tensor, own: Tensor, rows: Rows, their_classes: tuple[str, ...], classes: tuple[str, ...]) -> Tensor:
    """`own` with the rows of classes of both lists; all of `theirs`, if it does not depend on the classes."""
    counts = len(their_classes) + rows.background, len(classes) + rows.background
    if their_classes == classes:
        return theirs
    if rows.per_class is not None and len(theirs) != counts[0] * rows.per_class:
        return theirs  # one box for all classes
    if len(own) * counts[0] != len(theirs) * counts[1]:
        return own
    pairs = [(classes.index(name), i) for i, name in enumerate(their_classes) if name in classes]
    if pairs and rows.background:
        pairs.append((len(classes), len(their_classes)))
    result = own.clone()
    for target, source in pairs:
        _of_class(result, counts[1], rows)[:, target] = _of_class(theirs, counts[0], rows)[:, source]
    return result


def _of_class(layer: Tensor, count: int, rows: Rows) -> Tensor:
    """(outputs of a class, classes, ...), a view."""
    return layer.unflatten(0, (-1, count)) if rows.innermost else layer.unflatten(0, (count, -1)).transpose(0, 1)


def _same(meta: WeightsMeta, classes: Sequence[str], semantic_classes: Sequence[str]) -> bool:
    """Whether the classes are; those of pixels, where both have them."""
    return meta.classes == tuple(classes) and (not meta.semantic_classes or not semantic_classes
                                               or meta.semantic_classes == tuple(semantic_classes))


def tell_kept(meta: WeightsMeta, classes: Sequence[str], semantic_classes: Sequence[str]) -> str:
    """What became of the layers that tell classes apart."""
    if _same(meta, classes, semantic_classes):
        return "all layers go on, as the classes are the same"
    shared = [name for name in classes if name in meta.classes]
    kept = f"but for {', '.join(shared[:5])}{' ...' if len(shared) > 5 else ''}, known to both" if shared else \
        "as none of the classes was known"
    return f"layers of classes begin anew, {kept}"
