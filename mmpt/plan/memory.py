"""What a rank's memory holds at the fullest moment of a step, in bytes.

Activations are those that autograd keeps for the backward pass, counted with the model on small
sizes (a test). Legend: N ids of the rank's batch, D width, V vocabulary.
"""

from dataclasses import asdict, dataclass

from mmpt.plan.traffic import WIDE, Held, Layout, gathered_by_muon, held
from mmpt.plan.workload import ROOT, Workload
from mmpt.train.loss import CHUNK, MAX_LOGITS


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one rank. gathered: layers and their gradients before they are divided again.

    casts: bf16 copies of weights, which autograd keeps whole where activations are kept. head: the
    logits of a chunk, and gradients of the head. work: of the layer that runs backward, or of Muon.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    casts: float
    gathered: float
    head: float
    work: float

    @property
    def peak(self) -> float:
        """The head's part is gone when layers run backward."""
        fixed = self.weights + self.gradients + self.optimizer + self.average
        return fixed + self.activations + self.casts + max(self.head, self.gathered + self.work)

    def rounded(self) -> dict[str, float]:
        """GB, for people and JSON."""
        return {name: gb(value) for name, value in [*asdict(self).items(), ("peak", self.peak)]}


def gb(value: float) -> float:
    """Bytes in GB, to four digits."""
    return float(f"{value / 1e9:.4g}")


def memory(work: Workload, layout: Layout) -> Memory:
    """Of one rank of a layout, for the recipe's precision, optimiser and recomputation."""
    recipe, parts = work.recipe, held(work, layout)
    weights = sum(WIDE * each.mine * each.weight.num for each in parts)
    trained = [each for each in parts if each.weight.trained]
    gradients = sum(WIDE * each.mine * each.weight.num for each in trained)
    units = {each.unit for each in parts}
    sizes = {unit: sum(e.padded for e in parts if e.unit == unit) * WIDE for unit in units}
    root = sizes.pop(ROOT)
    alone = layout.side("shard")[0] == 1  # then nothing is gathered
    layer = 0 if alone else sum(sizes.values())
    ids = recipe.data.rows * recipe.data.length / layout.num_data
    kept = ids * kept_of_layer(work, layout, recipe.parallel.recompute)
    everything = ids * kept_of_layer(work, layout, "none")
    again = recipe.parallel.recompute != "none"
    casts = _casts(work, parts)
    gather_all = 1 if recipe.parallel.reshard or alone else work.model.num_layers
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=sum(_states(work, each) * each.mine * each.weight.num for each in trained),
        average=gradients if recipe.ema else 0,
        activations=work.model.num_layers * kept + _around(work, ids),
        casts=0 if again else casts * work.model.num_layers,
        # the layer that runs and the next one, gradients of the one and what is sent of them; the
        # root is there all the time, and its gradient
        gathered=layer * (gather_all + 3) + (0 if alone else 2 * root),
        head=_head(work, ids) + (0 if alone else root),
        # what is computed again, and about as much as a tenth of gradients beside it
        work=max(everything * (again + 0.1) + again * casts, _muon(work, layout)),
    )


def kept_of_layer(work: Workload, layout: Layout, recompute: str) -> float:
    """Bytes an id that a layer keeps for its backward pass."""
    model, a, t = work.model, work.products, layout.tensor
    cpu = work.recipe.device == "cpu"
    attended = WIDE if cpu else a  # CPUs attend in float32
    width, heads = model.width, model.width_of_heads
    keys = model.num_kv_heads * model.width_per_head
    clean = [group for group in model.groups.values() if not group.noisy]
    hidden = sum(
        work.share_of(group) * (group.mean_active * model.expert_hidden + group.shared_hidden)
        for group in clean
    )
    active = sum(work.share_of(group) * group.num_active for group in clean)
    stream = WIDE * width  # float32 in any precision
    if recompute == "full":
        return stream
    if recompute == "selective":  # outputs of products and of attention
        attention = (a * (heads + 2 * keys) + attended * heads) / t + a * width
        return stream + attention + a * (2 * hidden / t + active * width)
    norms = stream * (4 if cpu else 2)  # GPUs have one kernel for it
    attention = 2 * a * width + (2 if cpu else 1) * WIDE * (heads + keys) / t
    attention += 4 * attended * heads / t + attended * work.recipe.data.length  # and its mask
    if model.gated_attention:  # what attention gave, times the gates
        attention += attended * heads + WIDE * model.num_heads
    if model.untied_attention:  # the same, sorted by group
        attention += a * heads
    experts = stream + active * 2 * a * width + 3 * a * hidden / t
    return norms + attention + experts


def _around(work: Workload, ids: float) -> float:
    """Before and after the layers: the stream, and its gradient from the head."""
    return 3 * WIDE * ids * work.model.width


def _head(work: Workload, ids: float) -> float:
    vocabulary, width = work.model.vocab_size, work.model.width
    chunk = min(CHUNK, max(1, MAX_LOGITS // vocabulary), ids)
    logits = chunk * vocabulary * (WIDE + (2 * 2 if work.products == 2 else 0))
    # its gradient, and the same scaled; or a chunk's part of it and, in bf16, the weights
    return logits + vocabulary * width * 2 * WIDE


def _casts(work: Workload, parts: list[Held]) -> float:
    """Of the matrices of one layer."""
    if work.products == WIDE:
        return 0
    matrices = (e.whole for e in parts if len(e.weight.shape) > 1 and e.unit != ROOT)
    return work.products * sum(matrices)


def _states(work: Workload, each: Held) -> int:
    """Bytes an element: the mean, and but for Muon's matrices the square."""
    single = work.recipe.optim.kind == "muon" and each.weight.orthogonal
    return WIDE if single else 2 * WIDE


def _muon(work: Workload, layout: Layout) -> float:
    """The largest matrix that is gathered, and what its iteration needs beside it."""
    return max((4 * WIDE * each.padded for each in gathered_by_muon(work, layout)), default=0)
