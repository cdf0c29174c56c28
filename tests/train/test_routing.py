import json
import math

import pytest
import torch

from mmpt.train.routing import DEAD, Routing


def test_entropy_and_imbalance_of_each_layer():
    loads = {"text": torch.tensor([[5.0, 5.0], [9.0, 1.0]]), "speech": torch.ones(2, 1)}
    scores = {"text": torch.tensor([[4.0, 4.0], [3.0, 1.0]]), "speech": torch.ones(2, 1)}
    rows = Routing().look(loads, scores)
    assert set(rows) == {"text"}  # one expert has nothing to choose
    quarter = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert rows["text"]["entropy"] == pytest.approx([1.0, quarter], abs=1e-4)
    assert rows["text"]["imbalance"] == [1.0, 1.8]
    assert rows["text"]["dead"] == [0, 0]


def test_an_expert_is_dead_while_others_of_its_group_work():
    routing, scores = Routing(), {"text": torch.ones(1, 2)}
    works = {"text": torch.tensor([[1.0, 0.0]])}
    absent = {"text": torch.zeros(1, 2)}
    for _ in range(DEAD - 1):
        assert routing.look(works, scores)["text"]["dead"] == [0]
        row = routing.look(absent, {"text": torch.zeros(1, 2)})  # a group without ids says nothing
        assert row["text"] == {"entropy": [None], "imbalance": [None], "dead": [0]}
    again = Routing()
    again.load_state_dict(json.loads(json.dumps(routing.state_dict())))
    for each in (routing, again):
        assert each.look(works, scores)["text"]["dead"] == [1]
    assert routing.look({"text": torch.tensor([[0.0, 1.0]])}, scores)["text"]["dead"] == [0]


def test_ids_without_experts_and_gradients_are_told_where_there_are_any():
    loads = {"text": torch.tensor([[5.0, 5.0]]), "image": torch.tensor([[1.0, 3.0]])}
    unserved = {"text": torch.tensor([[2.0, 8.0]]), "image": torch.tensor([[0.0, 4.0]])}
    rows = Routing().look(loads, loads, unserved, {"text": torch.tensor([0.5])})
    assert rows["text"]["unserved"] == [0.25]
    assert rows["text"]["grad_norm"] == [0.5]
    assert not {"unserved", "grad_norm"} & set(rows["image"])
