"""Several ways at once beside the greedy route: time and memory of reading and of a training step by the number of branches.

    pathlm bench branches                 D 192, 12 blocks 2/8/2, 8 route steps, rows of 256 tokens, 4 at a time, on the CPU
    pathlm bench branches --device cuda   brian-r125 in bfloat16

Routers are drawn at random, so that branches differ, and nobody leaves early: B branches then run up to B times the pool's blocks. Blocks
run per token are told by the model. A step's memory is what the backward pass keeps, counted tensor by tensor.
"""

import statistics
from typing import Any

import torch

import pathlm
from benchmarks.timing import Ratio, arguments, interleaved, ratio, show

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 32},
    "cpu": {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 4_096, "max_position_embeddings": 256},
}
SHAPE = {"pre_blocks": 2, "pool_blocks": 8, "post_blocks": 2, "max_route_steps": 8, "min_route_steps": 8, "block_position_dim": 16}
MEMORIES = ("local", "canonical")


def main(argv: list[str]) -> dict:
    """Measure and show. Ratios are to one branch with the same memory."""
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="models too small to mean anything, to try the program itself")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; nothing measured")
        return {}
    torch.set_num_threads(options.threads)
    calls, told = {}, {}
    for memory in MEMORIES:
        model, tokens = _model(memory, options), None
        tokens = torch.randint(0, model.config.vocab_size, (options.rows, _length(model)), device=options.device)
        for number in sorted({1, *options.branches}):
            for kind in ("reading", "training step"):
                name = f"{kind}, {memory}, {number} branch{'es' * (number > 1)}"
                calls[name] = _Call(model, tokens, number, training=kind != "reading")
                told[name] = calls[name].counted()
    seconds = interleaved(calls, repeats=options.repeats, warmup=1)
    rows = []
    for name, times in seconds.items():
        blocks, kept = told[name]
        rows.append({"case": name, "median ms": 1e3 * statistics.median(times), "blocks/token": blocks, "kept MB": kept / 1e6})
    ratios: dict[str, Ratio] = {}
    for name in seconds:
        alone = name.split(", ")[:2]
        one = ", ".join([*alone, "1 branch"])
        if name != one:
            ratios[f"{name} ÷ 1 branch (blocks {told[name][0] / told[one][0]:.2f}×)"] = ratio(seconds[name], seconds[one])
    return show("branches beside the greedy route", rows, ratios, options=options)


class _Call:
    """Reads rows, or takes the gradients of their loss, with a number of branches."""

    def __init__(self, model: Any, tokens: torch.Tensor, branches: int, *, training: bool) -> None:
        self.model, self.tokens, self.branches, self.training = model, tokens, branches, training

    def __call__(self) -> Any:
        half = torch.autocast(self.tokens.device.type, dtype=torch.bfloat16, enabled=self.tokens.is_cuda)
        with torch.set_grad_enabled(self.training), half:
            output = self.model(self.tokens, labels=self.tokens, route_beams=self.branches, skip_logits=True, use_cache=False)
        if self.training:
            output.loss.backward()
            self.model.zero_grad()
        return output

    def counted(self) -> tuple[float, int]:
        """Return the blocks run per token and the bytes that the backward pass keeps."""
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = self()
        owned = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        return float(output.metrics["route/block_evaluations"]), sum(size for place, size in kept.items() if place not in owned)


def _model(memory: str, options: Any) -> Any:
    """Return a model whose router chooses at random and lets nobody leave."""
    torch.manual_seed(0)
    if options.device == "cuda" and not options.tiny:
        config = pathlm.preset("brian-r125", memory=memory, min_route_steps=8)
    else:
        config = pathlm.preset("brian-tiny", memory=memory, **SHAPE | SIZES["tiny" if options.tiny else "cpu"])
    model = pathlm.build(config).to(options.device)
    with torch.no_grad():
        for parameter in model.pool.router.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def _length(model: Any) -> int:
    return min(model.config.max_position_embeddings, 256)
