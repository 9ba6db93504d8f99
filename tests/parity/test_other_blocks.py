"""The gradient of blocks that were not visited: what the router is told of a block it did not choose."""

import torch

from pathlm.models.brian.configuration import BrianConfig
from pathlm.models.brian.modeling import BrianForCausalLM
from pathlm.models.brian.pool import Plan, PoolRun
from pathlm.models.brian.sight import Sight
from pathlm.models.brian.table import Surroundings


def test_an_unvisited_block_gives_its_probability_the_gradient_of_having_been_visited_and_changes_nothing_else():
    torch.manual_seed(0)
    sizes = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.3}
    model = BrianForCausalLM(BrianConfig(**sizes, pool_blocks=2, max_route_steps=1, block_position="none")).double()
    for parameter in model.pool.parameters():
        torch.nn.init.normal_(parameter)
    h_BTD, weight_BTD = torch.randn(6, 1, 16).double(), torch.randn(6, 1, 16).double()
    around = Surroundings(model.rotary(torch.zeros(1, 1).long(), torch.float64), Sight.of(1, 0, None, torch.device("cpu")))
    found = {}
    for share in (0.0, 1.0):
        model.zero_grad()
        plan = Plan(torch.tensor(-torch.inf), gate=0.5, other_share=share)
        out_BTD = PoolRun(model.pool, model.pool_blocks, around, plan).run(h_BTD)[0]
        (out_BTD * weight_BTD).sum().backward()
        found[share] = (out_BTD, model.pool.router.from_hidden.weight.grad, model.pool_blocks[0].qkv_proj.weight.grad)
    assert torch.equal(found[0.0][0], found[1.0][0]) and torch.equal(found[0.0][2], found[1.0][2])
    assert not torch.allclose(found[0.0][1], found[1.0][1])

    # One token sees only itself: the other block reads the value that the chosen block wrote.
    model.zero_grad()
    score = model.pool.scores(h_BTD[:, 0], torch.empty(6, 0), 0)[0]
    total = torch.zeros(()).double()
    for row, chosen in enumerate(score.argmax(-1).tolist()):
        h = h_BTD[row, 0].detach()
        with torch.no_grad():
            value = model.pool_blocks[chosen].project(h)[-2:].flatten()
            moved = [block.finish(h, value) - h for block in model.pool_blocks]
        for block, way in enumerate(moved):
            total = total + 0.5 * score[row].softmax(-1)[block] * (way * weight_BTD[row, 0]).sum()
    total.backward()
    torch.testing.assert_close(model.pool.router.from_hidden.weight.grad, found[1.0][1])
