"""Personal parameters stay with their client: FedPer, FedRep and FedBN against plain loops; and where they are kept."""

from __future__ import annotations

import copy
import itertools
import warnings

import lightning.pytorch as pl
import pytest
import torch
from conftest import Recorder, TinyModule, flat_params, make_data
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import TensorDataset

from lightning_lbgm import (
    ErrorFeedback,
    FederatedCallback,
    FedProx,
    LBGMFederated,
    LookBack,
    NaturalPartitioner,
    SignSGD,
    TopK,
)
from lightning_lbgm.clients import LocalObjective
from lightning_lbgm.protocol.channel import SharedChannel
from lightning_lbgm.simulation import undo as round_undo
from recipes import personal as recipe

OWNER = torch.tensor([0] * 12 + [1] * 12 + [2] * 24)
METHODS = {
    "FedPer": {"personal": ["head.*"]},
    "FedRep": {"personal": ["head.*"], "personal_steps": 2},
    "FedBN": {"personal": ["body.1.*"]},
    "buffers alone": {"personal": ["*running*", "*.num_batches_tracked"]},
    "all kinds": {"personal": lambda name, tensor: name.startswith(("head", "body.1")), "personal_steps": 1},
}


class Split(TinyModule):
    """A body and a head, with momentum and weight decay, which move parameters that have a gradient of zeros.

    No bias before the BatchNorm: its gradient is rounding alone, which Adam would blow up.
    """

    def __init__(self, lr=0.2, optimizer=torch.optim.SGD, **settings) -> None:
        torch.manual_seed(0)
        defaults = {"momentum": 0.9, "weight_decay": 0.05} if optimizer is torch.optim.SGD else {}
        super().__init__(lr, nn.Linear(1, 1), optimizer, **{**defaults, **settings})
        del self.net
        self.body = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


def federated(**settings):
    defaults = {"partitioner": NaturalPartitioner(OWNER), "local_steps": 4, "uplink": [], "seed": 0}
    return LBGMFederated(3, **{"execution": "sequential", **defaults, **settings})


def train(fit, method="FedPer", module=None, trainer=None, **settings):
    """Train three clients for three rounds and return (trainer, module)."""
    strategy = federated(**METHODS.get(method, {}), **settings)
    module = Split() if module is None else module
    return fit(strategy, module=module, dataset=make_data(48), **{"batch_size": 4, **(trainer or {})})


def states_of(trainer):
    return {k: copy.deepcopy(dict(state)) for k, state in sorted(trainer.strategy._federation.clients.items())}


def personal_of(trainer):
    return {k: state["personal"] for k, state in states_of(trainer).items()}


def assert_equal_states(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert one.keys() == other.keys()


def whole_state(module):
    return {**module.state_dict(), **dict(module.named_parameters())}


# Against plain PyTorch


def reference(personal, steps, rounds=3, local_steps=4):
    """Twenty lines of federated averaging with personal tensors. Returns (global state, each client's personal one)."""
    model, (x, y) = Split(), make_data(48).tensors
    server = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = {k: {n: t.clone() for n, t in server.items() if personal(n)} for k in range(3)}
    shares = [0.25, 0.25, 0.5]
    for _ in range(rounds):
        mean = {n: torch.zeros_like(t) for n, t in server.items() if not personal(n) and t.is_floating_point()}
        for k in range(3):
            model.load_state_dict({**server, **own[k]})
            optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.05)
            parts = list(zip(x[OWNER.eq(k)].split(4), y[OWNER.eq(k)].split(4)))
            for step in range(local_steps):
                optimizer.zero_grad()
                model.loss(parts[step % len(parts)]).backward()
                for name, parameter in model.named_parameters():
                    if steps and (step < steps) != personal(name):
                        parameter.grad = None
                optimizer.step()
            own[k] = {n: t.clone() for n, t in model.state_dict().items() if personal(n)}
            for name in mean:
                mean[name] += shares[k] * (model.state_dict()[name] - server[name])
        server = {name: tensor + mean[name] if name in mean else tensor for name, tensor in server.items()}
    return server, own


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("execution", ["sequential", "vectorized"])
def test_it_equals_a_plain_loop(fit, method, execution):
    personal = {
        "FedBN": lambda name: name.startswith("body.1"),
        "buffers alone": lambda name: "running" in name or "num_batches" in name,
        "all kinds": lambda name: name.startswith(("head", "body.1")),
    }.get(method, lambda name: name.startswith("head"))
    steps = METHODS[method].get("personal_steps", 0)
    server, own = reference(personal, steps)
    tolerance = 2e-6 if execution == "sequential" else 2e-5
    trainer, module = train(fit, method, execution=execution)
    for name, tensor in module.state_dict().items():
        told = lambda message, name=name: f"{name}: {message}"  # noqa: E731
        torch.testing.assert_close(tensor, server[name], rtol=1e-5, atol=tolerance, msg=told)
    for client_id, values in personal_of(trainer).items():
        assert values.keys() == own[client_id].keys()
        torch.testing.assert_close(values, own[client_id], rtol=1e-5, atol=tolerance)
    # They differ from one another, and the global model's are the initial ones.
    name = next(n for n, t in own[0].items() if t.is_floating_point())
    assert not torch.allclose(own[0][name], own[1][name], atol=1e-3)
    assert torch.equal(module.state_dict()[name], Split().state_dict()[name])


def test_training_step_by_step_changes_one_group_at_a_time(fit):
    seen = []

    class Watching(Split):
        def training_step(self, batch, batch_idx):
            seen.append((batch_idx, self.head.weight.detach().clone(), self.body[0].weight.detach().clone()))
            return super().training_step(batch, batch_idx)

    train(fit, "FedRep", module=Watching(), trainer={"max_epochs": 1})
    for (index, head, body), (following, next_head, next_body) in itertools.pairwise(seen):
        if following > index:
            assert torch.equal(head, next_head) == (index >= 2)
            assert torch.equal(body, next_body) == (index < 2)


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("FedRep", torch.optim.AdamW), ("FedBN", torch.optim.Adagrad), ("all kinds", torch.optim.AdamW)],
)
def test_vectorized_equals_sequential(fit, method, optimizer):
    results = []
    for execution in ("sequential", "vectorized"):
        settings = {"execution": execution, "vectorized_chunk": 2, "objective": FedProx(0.1), "buffers": "client"}
        clip = {"gradient_clip_val": 0.5}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(train(fit, method, Split(0.02, optimizer), clip, uplink=[LookBack(0.5)], **settings))
    (one, module), (two, other) = results
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(personal_of(one), personal_of(two), rtol=1e-4, atol=1e-5)
    assert one.strategy.ledger == two.strategy.ledger


# What is sent


@pytest.mark.parametrize("method", METHODS)
def test_what_is_personal_is_not_sent(fit, method):
    trainer, module = train(fit, method)
    federation = trainer.strategy._federation
    own = personal_of(trainer)[0]
    shared = [p for name, p in module.named_parameters() if name not in own]
    assert trainer.strategy.settings()["num_parameters"] == sum(p.numel() for p in shared)
    assert federation.flat.num_parameters == sum(p.numel() for p in shared)
    statistics = sum(b.numel() for n, b in module.named_buffers() if b.is_floating_point() and n not in own)
    bits = 32 * 9 * (federation.flat.num_parameters + statistics)
    framing = trainer.strategy.ledger.uplink_bits - bits  # names and shapes of the statistics
    assert framing == 0 if not statistics else 0 < framing < 9 * 2 * 8 * 40
    assert trainer.strategy.ledger.dense_uplink_bits == trainer.strategy.ledger.uplink_bits
    assert trainer.strategy.ledger.downlink_bits == bits


def test_messages_hold_the_shared_parameters_alone(fit, monkeypatch):
    seen, send = [], SharedChannel.send

    def watch(channel, client_id, update, buffers, context, state):
        seen.append((update.dense().numel(), set(buffers)))
        return send(channel, client_id, update, buffers, context, state)

    monkeypatch.setattr(SharedChannel, "send", watch)
    train(fit, "all kinds")
    assert seen == [(30, set())] * 9
    seen.clear()
    train(fit, "FedPer")
    assert seen == [(40, {"body.1.running_mean", "body.1.running_var"})] * 9


@pytest.mark.parametrize(
    "settings",
    [
        {"uplink": [LookBack(0.5, "layer")]},
        {"uplink": [ErrorFeedback(TopK(0.3)), LookBack(0.5)], "downlink": [TopK(0.5), SignSGD()]},
        {"server_optimizer": lambda params: torch.optim.Adam(params, lr=0.01)},
    ],
    ids=["layers", "downlink", "server optimizer"],
)
def test_uplink_downlink_and_server_have_the_shared_parameters_alone(fit, settings):
    recorder = Recorder()
    trainer, module = train(fit, "FedPer", trainer={"callbacks": [recorder]}, **settings)
    federation = trainer.strategy._federation
    assert federation.flat.names == ("body.0.weight", "body.1.weight", "body.1.bias")
    shapes = [tuple(p.shape) for group in federation.server.optimizer.param_groups for p in group["params"]]
    assert shapes == [(5, 6), (5,), (5,)]
    if "downlink" not in settings and settings.get("uplink"):
        assert len(recorder.reports[-1].clients[0].decision.errors) == 3
    assert torch.equal(module.head.weight, Split().head.weight)
    assert not torch.equal(module.body[0].weight, Split().body[0].weight)


def test_nothing_personal_is_the_federation_without_it(fit):
    (one, module), (two, other) = train(fit, "", personal=[]), train(fit, "")
    assert torch.equal(flat_params(module), flat_params(other))
    assert one.strategy.settings() == two.strategy.settings()
    assert "personal" not in one.strategy.settings()
    assert set(states_of(one)[0]) == {"uplink"}


# Clients' states


def test_a_late_client_starts_from_the_initial_values(fit):
    starts, recorder = [], Recorder()

    class Watching(Split):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                starts.append(torch.equal(self.head.weight, Split().head.weight))
            return super().training_step(batch, batch_idx)

    many = {"max_epochs": 6, "callbacks": [recorder]}
    train(fit, "FedPer", module=Watching(), clients_per_round=1, trainer=many)
    cohorts = [report.clients[0].client_id for report in recorder.reports]
    assert len(set(cohorts)) > 1
    # Each client's first turn, and no later one.
    assert starts == [client_id not in cohorts[:turn] for turn, client_id in enumerate(cohorts)]


@pytest.mark.parametrize(("method", "execution"), [("FedRep", "vectorized"), ("all kinds", "sequential")])
def test_resuming_goes_on_to_the_bit(fit, tmp_path, method, execution):
    whole, reference_module = train(fit, method, execution=execution, trainer={"max_epochs": 4})
    part, _ = train(fit, method, execution=execution, trainer={"max_epochs": 2})
    part.save_checkpoint(tmp_path / "a.ckpt")
    again = {"max_epochs": 4, "ckpt_path": tmp_path / "a.ckpt"}
    resumed, module = train(fit, method, execution=execution, trainer=again)
    assert_equal_states(whole_state(module), whole_state(reference_module))
    assert_equal_states(personal_of(resumed), personal_of(whole))
    assert resumed.strategy.ledger == whole.strategy.ledger
    # The checkpoint's model loads as it is, with the initial values of what is personal.
    plain = Split.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(plain.head.weight, Split().head.weight)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_checkpoint_within_a_round_has_the_values_of_its_start(fit, tmp_path, on_disk):
    class Save(FederatedCallback):
        def on_client_end(self, trainer, pl_module, report):
            if (trainer.global_step, report.client_id) == (1, 1):
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    store = {"client_store": str(tmp_path / "store")} if on_disk else {}
    trainer = {"max_epochs": 3, "callbacks": [Save()]}
    whole, reference_module = train(fit, "all kinds", trainer=trainer, **store)
    again = {"max_epochs": 3, "ckpt_path": tmp_path / "a.ckpt"}
    resumed, module = train(fit, "all kinds", trainer=again, **store)
    assert_equal_states(whole_state(module), whole_state(reference_module))
    assert_equal_states(personal_of(resumed), personal_of(whole))


def test_a_checkpoint_goes_on_with_the_same_personal_parameters_alone(fit, tmp_path):
    trainer, _ = train(fit, "buffers alone", trainer={"max_epochs": 1})
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(MisconfigurationException, match="has `personal=.*this one `personal=None`"):
        train(fit, "", trainer={"ckpt_path": tmp_path / "a.ckpt"})
    with pytest.raises(MisconfigurationException, match="has `personal=.*this one `personal="):
        train(fit, "", personal=["*running_mean"], trainer={"ckpt_path": tmp_path / "a.ckpt"})
    reordered = METHODS["buffers alone"]["personal"][::-1]
    trainer, _ = train(fit, "", personal=reordered, trainer={"ckpt_path": tmp_path / "a.ckpt"})
    assert trainer.global_step == 3


def test_states_on_disk_and_forgotten_memories_change_nothing(fit, tmp_path):
    settings = {"uplink": [LookBack(0.9)], "clients_per_round": 2, "trainer": {"max_epochs": 5}}
    one, module = train(fit, "all kinds", **settings)
    two, other = train(fit, "all kinds", client_store=str(tmp_path / "store"), **settings)
    assert_equal_states(whole_state(module), whole_state(other))
    assert_equal_states(personal_of(one), personal_of(two))
    three, _ = train(fit, "all kinds", client_capacity=1, **settings)
    assert all(values.keys() == personal_of(one)[k].keys() for k, values in personal_of(three).items())


@pytest.mark.filterwarnings("ignore:.*not finite")
@pytest.mark.parametrize("poisoned", ["shared", "personal", "message"])
def test_a_rejected_client_keeps_its_old_values(fit, poisoned, monkeypatch):
    class Diverging(Split):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 2 and poisoned != "message" and float(batch[0][0, 0]) == first:
                loss = loss * 0
                loss = loss + (self.body[0] if poisoned == "shared" else self.head).weight.sum() * float("inf")
            return loss

    first = float(make_data(48).tensors[0][OWNER == 1][0, 0])
    before, _ = train(fit, "FedPer", trainer={"max_epochs": 2})
    if poisoned == "message":  # it is lost on its way

        def lose(channel, client_id, update, buffers, context, state):
            lost = client_id == 1 and context.round_index == 2
            return None if lost else send(channel, client_id, update, buffers, context, state)

        send = SharedChannel.send
        monkeypatch.setattr(SharedChannel, "send", lose)
    recorder = Recorder()
    trainer, module = train(fit, "FedPer", Diverging(), trainer={"max_epochs": 3, "callbacks": [recorder]})
    assert [c.rejected for c in recorder.reports[-1].clients] == [False, True, False]
    assert_equal_states(personal_of(trainer)[1], personal_of(before)[1])
    assert not torch.equal(personal_of(trainer)[0]["head.weight"], personal_of(before)[0]["head.weight"])
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("most_bytes", [2**30, 0])
def test_a_round_that_breaks_off_is_taken_back(fit, monkeypatch, most_bytes):
    class Breaking(Split):
        broken = True

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.broken and batch.index == 2:
                raise RuntimeError("boom")

    monkeypatch.setattr(round_undo, "_MAX_KEPT_BYTES", most_bytes)
    settings = {"uplink": [LookBack(0.0)], "trainer": {"max_epochs": 2}}
    before, at_two = train(fit, "all kinds", **settings)
    module, strategy = Breaking(), federated(**METHODS["all kinds"], uplink=[LookBack(0.0)])
    loader = torch.utils.data.DataLoader(make_data(48), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(strategy=strategy, max_epochs=4, accelerator="cpu", enable_model_summary=False, **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit(module, loader)
    assert_equal_states(whole_state(module), whole_state(at_two))
    # What a client has sent may be forgotten if it is too large to be kept twice; what is its own is not.
    assert_equal_states(personal_of(trainer), personal_of(before))
    assert ("uplink" in states_of(trainer)[0]) == (most_bytes > 0)
    module.broken = False
    trainer.fit(module, loader)
    whole, reference_module = train(fit, "all kinds", uplink=[LookBack(0.0)], trainer={"max_epochs": 4})
    assert_equal_states(whole_state(module), whole_state(reference_module))
    assert_equal_states(personal_of(trainer), personal_of(whole))


def test_a_clients_model_can_be_put_into_the_module_for_a_while(fit):
    trainer, module = train(fit, "all kinds")
    federation, before = trainer.strategy._federation, copy.deepcopy(whole_state(module))
    with federation.client_model(1):
        inside = whole_state(module)
        own = personal_of(trainer)[1]
        assert own.keys() == {n for n in before if n.startswith(("head", "body.1"))}
        for name, tensor in inside.items():
            assert torch.equal(tensor, own.get(name, before[name]))
        assert not torch.equal(inside["head.weight"], before["head.weight"])
    assert_equal_states(whole_state(module), before)
    with federation.client_model(99):  # one that has had no turn
        assert_equal_states(whole_state(module), before)


# Callbacks that freeze, and other modules


@pytest.mark.filterwarnings("ignore:The trainable parameters changed")
def test_personal_values_outlast_a_change_of_the_trainable_parameters(fit):
    class Freeze(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch.index == 2:
                kept.update(personal_of(trainer))
                pl_module.body[0].requires_grad_(False)  # M changes
                pl_module.head.bias.requires_grad_(False)  # and a personal parameter is trained no more
            if batch.index == 3:
                assert trainer.strategy._federation.flat.num_parameters == 10
                pl_module.head.bias.requires_grad_(True)

    kept = {}
    trainer, module = train(fit, "FedPer", trainer={"max_epochs": 3, "callbacks": [Freeze()]})
    assert trainer.strategy._federation.flat.num_parameters == 10
    for client_id, values in personal_of(trainer).items():
        assert torch.equal(values["head.bias"], kept[client_id]["head.bias"])
        assert not torch.equal(values["head.weight"], kept[client_id]["head.weight"])
    kept.clear()
    trainer, module = train(fit, "FedPer", trainer={"max_epochs": 5, "callbacks": [Freeze()]})
    for client_id, values in personal_of(trainer).items():
        assert not torch.equal(values["head.bias"], kept[client_id]["head.bias"])
    assert torch.equal(module.head.bias, Split().head.bias)


def test_a_frozen_parameter_is_kept_only_if_the_step_moves_it(fit):
    class Momentum(Split):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(6, 3).requires_grad_(False)
            self.backbone = nn.Linear(6, 3).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            self.encoder.weight.data.mul_(0.9).add_(batch[0].mean(0), alpha=0.1)
            return super().training_step(batch, batch_idx)

    trainer, module = train(fit, "", Momentum(), personal=["encoder.*", "backbone.*"])
    assert all(set(values) == {"encoder.weight"} for values in personal_of(trainer).values())
    assert not torch.equal(personal_of(trainer)[0]["encoder.weight"], personal_of(trainer)[1]["encoder.weight"])
    assert torch.equal(module.encoder.weight, Momentum().encoder.weight)


def test_a_buffer_that_the_step_makes_may_be_personal(fit):
    class Making(Split):
        def __init__(self):
            super().__init__()
            self.register_buffer("made", None, persistent=False)

        def training_step(self, batch, batch_idx):
            self.made = batch[0].mean(0) if self.made is None else self.made + batch[0].mean(0)
            return super().training_step(batch, batch_idx)

    trainer, module = train(fit, "", Making(), personal=["made", "head.*"])
    sums = [values["made"] for values in personal_of(trainer).values()]
    assert len(sums) == 3
    assert not torch.equal(sums[0], sums[1])
    assert module.made is None


@pytest.mark.parametrize("kind", ["compiled", "lazy", "adapters", "bfloat16", "mixed"])
def test_other_modules(fit, kind):
    class Module(Split):
        def __init__(self):
            super().__init__()
            if kind == "compiled":
                self.body = torch.compile(self.body, backend="eager")
                self.head = torch.compile(self.head, backend="eager")
            elif kind == "lazy":
                self.head = nn.LazyLinear(3)
            elif kind == "adapters":
                self.body.requires_grad_(False)
                self.adapter = nn.Linear(5, 5)

        def forward(self, x):
            return self.head(self.adapter(self.body(x))) if kind == "adapters" else super().forward(x)

    precision = {"bfloat16": {"precision": "bf16-true"}, "mixed": {"precision": "bf16-mixed"}}.get(kind, {})
    trainer, module = train(fit, "FedRep", Module(), trainer=precision)
    prefix = "head._orig_mod." if kind == "compiled" else "head."
    heads = [values[prefix + "weight"] for values in personal_of(trainer).values()]
    assert not torch.equal(heads[0], heads[1])
    assert heads[0].dtype == (torch.bfloat16 if kind == "bfloat16" else torch.float32)
    shared = {"adapters": 30}.get(kind, 40)
    assert trainer.strategy._federation.flat.num_parameters == shared
    if kind == "compiled":  # as uncompiled
        _, plain = train(fit, "FedRep")
        torch.testing.assert_close(flat_params(module), flat_params(plain), rtol=1e-5, atol=1e-6)


def test_tied_weights_are_personal_under_all_names_or_refused(fit):
    class Tied(Split):
        def __init__(self):
            super().__init__()
            self.copy = self.head

    with pytest.raises(MisconfigurationException, match=r"matches 'head\.\w+' and not 'copy\.\w+'.*both or neither"):
        train(fit, "FedPer", Tied())
    trainer, _ = train(fit, "", Tied(), personal=["head.*", "copy.*"])
    assert set(personal_of(trainer)[0]) == {"head.weight", "head.bias"}


class Counting(LocalObjective):
    """Counts steps and turns, and looks at what it is shown."""

    def init(self, start):
        return {"corrected": torch.zeros(()), "steps": torch.zeros(()), "shapes": str([tuple(t.shape) for t in start])}

    def correct(self, gradients, parameters, start, state):
        state["corrected"] += 1
        assert len(gradients) == len(parameters) == len(start)

    def end_turn(self, parameters, start, state, num_steps):
        state["steps"] += num_steps


def test_an_objective_sees_the_shared_parameters_in_the_steps_that_change_them(fit):
    trainer, _ = train(fit, "FedRep", objective=Counting(), trainer={"max_epochs": 2})
    for state in states_of(trainer).values():
        assert state["objective"]["shapes"] == "[(5, 6), (5,), (5,)]"
        assert float(state["objective"]["corrected"]) == float(state["objective"]["steps"]) == 2 * (4 - 2)


# Words


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        (
            {"personal": "head.*"},
            TypeError,
            r"`personal` must be a list of patterns such as \['head\.\*'\].*'head\.\*'",
        ),
        ({"personal": [3]}, TypeError, r"got \[3\]"),
        ({"personal": 5}, TypeError, "got 5"),
        ({"personal": ["head.*"], "personal_steps": 0}, ValueError, "must be a positive integer; got 0"),
        ({"personal": ["head.*"], "personal_steps": True}, ValueError, "must be a positive integer; got True"),
        ({"personal_steps": 2}, ValueError, "pass `personal="),
        ({"personal": [], "personal_steps": 2}, ValueError, "pass `personal="),
        ({"personal": ["head.*"], "personal_steps": 4, "local_steps": 4}, ValueError, "leaves no step for the shared"),
    ],
)
def test_wrong_arguments(settings, error, match):
    with pytest.raises(error, match=match):
        LBGMFederated(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"personal": ["head.*", "heads.weight"]},
            r"'heads\.weight' of `personal` matches none.*nearest are 'head\.weight'",
        ),
        ({"personal": ["xyz"]}, r"'xyz' of `personal` matches none of its 8 .*'body\.0\.weight'"),
        ({"personal": lambda name, tensor: False}, "is true for none of its 8 parameters and buffers, such as"),
        ({"personal": ["*"]}, "All of its 5 trainable parameters are personal"),
        ({"personal": ["*running*"], "personal_steps": 2}, "matches buffers alone"),
    ],
)
def test_wrong_patterns_are_refused_at_fit_start(fit, settings, match):
    with pytest.raises(MisconfigurationException, match=f"`Split` cannot be federated.*{match}"):
        train(fit, "", **settings)


def test_validation_of_untrained_personal_parameters_is_warned_of(fit):
    with pytest.warns(UserWarning, match="its own of 2 parameters.*'head.weight'.*ClientEvaluation"):
        train(fit, "FedPer", trainer={"val": True, "max_epochs": 1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(fit, "FedPer", trainer={"max_epochs": 1})
        train(fit, "buffers alone", trainer={"val": True, "max_epochs": 1})
    assert not [w for w in caught if "its own of" in str(w.message)]


def test_clients_with_too_few_steps_for_the_shared_parameters(fit):
    dataset = TensorDataset(*(t[:30] for t in make_data(48).tensors))
    settings = {"partitioner": NaturalPartitioner([0] * 4 + [1] * 12 + [2] * 14), "local_steps": None}
    for steps, match in ((1, "1 of 3 clients make no more local"), (9, "every client makes at most")):
        strategy = federated(personal=["head.*"], personal_steps=steps, **settings)
        with (
            pytest.warns(UserWarning, match=match)
            if steps == 1
            else pytest.raises(MisconfigurationException, match=match)
        ):
            fit(strategy, module=Split(), dataset=dataset, batch_size=4, max_epochs=1)


def test_the_settings_say_what_is_personal(fit):
    trainer, _ = train(fit, "FedRep", trainer={"max_epochs": 1})
    assert trainer.strategy.settings()["personal"] == ["head.*"]
    assert trainer.strategy.settings()["personal_steps"] == 2


def test_the_recipe_needs_no_data(monkeypatch, capsys):
    monkeypatch.delenv("LBGM_DATA", raising=False)
    for options in (["--method", "fedper", "fedrep"], ["--method", "fedbn", "--skew", "features"]):
        results = recipe.main([*options, "--rounds", "2", "--clients", "5", "--seeds", "0"])
        assert [len(accuracies) for accuracies in results.values()] == [5] * len(results)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("fed")]
    assert [row[0] for row in rows] == ["fedper", "fedrep", "fedbn"]
    body, norm, statistics = 64 * 64, 128, 128
    sent = 2 * 5 * 4 * (body + norm + statistics)
    assert sent < int(rows[0][-2].replace(",", "")) < sent + 2 * 5 * 100
