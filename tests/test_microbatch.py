"""AutoMicrobatch: a batch in parts is the whole batch, and running out of memory costs a retry and nothing else."""

import collections
import dataclasses
import gc
import logging
import weakref

import numpy as np
import pytest
import torch
from helpers import At, batches, bits, learner, rngs, spying, throw, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minifast import AutoMicrobatch, CancelBatch, GradientClip, LRFinder, MixedPrecision, TensorLoader
from minifast.base.batch import parts

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def no_memory(n):
    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {n} GiB")


def real_no_memory(n):
    torch.empty(2**50 * n, dtype=torch.uint8)


class Small(nn.Module):
    """A model that has memory for `room` samples; `where` it runs out: "forward" or "backward"."""

    def __init__(self, room=10**9, where="forward", error=no_memory, dropout=0.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.room, self.where, self.error, self.sizes = room, where, error, []
        self.body, self.drop, self.head = nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 1)
        self.to(dtype)

    def forward(self, x, **_):
        n = len(x)
        if self.training:
            self.sizes.append(n)
        if n > self.room and self.where == "forward":
            self.error(n)
        hidden = self.body(x)
        if n > self.room and self.training:  # the head has its gradient by then, the body has not
            hidden.register_hook(lambda grad: self.error(n))
        return self.head(self.drop(hidden.tanh()))


def data_of(sizes, dtype=torch.float64):
    return batches(size=sizes, dtype=dtype)


def assert_same_weights(ours, theirs):
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, **CLOSE)


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), k=st.integers(1, 3), size=st.integers(1, 10),
       room=st.integers(1, 10), where=st.sampled_from(["forward", "backward"]))  # fmt: skip
def test_parts_are_the_whole_batch(sizes, k, size, room, where):
    data = data_of(sizes)
    whole = learner(data, model=Small())
    whole.fit(0.3, 2, accumulate=k)
    split = learner(data, model=Small(room, where), callbacks=[AutoMicrobatch(size)])
    split.fit(0.3, 2, accumulate=k)
    assert_same_weights(split, whole)
    assert len(split.opt.seen) == len(whole.opt.seen)
    assert split.recorder.losses == pytest.approx(whole.recorder.losses, rel=1e-9)
    assert split.recorder.epochs[-1]["train_loss"] == pytest.approx(whole.recorder.epochs[-1]["train_loss"], rel=1e-9)


@pytest.mark.parametrize("k", [1, 2])
def test_without_a_need_it_changes_no_bit(k):
    plain, watched = (learner(data_of([4, 3, 5]), model=Small(dropout=0.5)) for _ in range(2))
    before = torch.get_rng_state()
    plain.fit(0.3, accumulate=k)
    after = rngs()
    torch.set_rng_state(before)
    watched.fit(0.3, accumulate=k, callbacks=[AutoMicrobatch()])
    assert rngs() == after
    assert trained(plain) == trained(watched)
    assert bits(plain.recorder.losses) == bits(watched.recorder.losses)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_retry_is_as_if_nothing_had_happened(where, k):
    """The same random numbers and no gradient left over: bit for bit the fit that began with small parts."""
    learns = [learner(data_of([8, 8, 5]), model=model, callbacks=[callback]) for model, callback in (
        (Small(3, where, dropout=0.5), AutoMicrobatch()), (Small(dropout=0.5), AutoMicrobatch(2)))]  # fmt: skip
    for learn in learns:
        torch.manual_seed(1)
        learn.fit(0.3, accumulate=k)
    assert trained(learns[0]) == trained(learns[1])
    assert bits(learns[0].recorder.losses) == bits(learns[1].recorder.losses)


@pytest.mark.parametrize("error", [no_memory, real_no_memory])
def test_it_halves_until_it_fits_and_says_so_once(caplog, error):
    micro = AutoMicrobatch()
    learn = learner(data_of([12, 12, 7]), model=Small(3, error=error), callbacks=[micro])
    with caplog.at_level(logging.INFO, "minifast"):
        learn.fit(0.1)
    assert learn.model.sizes == [12, 6, *[3] * 4, *[3] * 4, 2, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: from now on, batches are run in parts of at most 3 samples (AutoMicrobatch)."]  # fmt: skip
    caplog.clear()
    learn.model.sizes.clear()
    learn.fit(0.1)
    assert max(learn.model.sizes) == 3, "kept across fits"
    assert not caplog.records
    assert micro.state_dict() == {"current_size": 3}
    assert micro.size is None
    assert repr(micro) == "AutoMicrobatch(size=None, min_size=1)"
    other = AutoMicrobatch()
    other.load_state_dict(micro.state_dict())
    assert other.current_size == 3


def test_the_failed_attempt_is_forgotten_before_the_next():
    """Its output, and with that the whole graph, is garbage by then: nothing, not even the error, holds on to it."""
    failed = []

    class Watched(Small):
        def forward(self, x):
            assert all(ref() is None for ref in failed)
            output = super().forward(x)
            if len(x) > self.room:
                failed.append(weakref.ref(output))
            return output

    gc.disable()  # reference counts alone must do it
    try:
        learner(data_of([8]), model=Watched(2, "backward"), callbacks=[AutoMicrobatch()]).fit(0.1)
    finally:
        gc.enable()
    assert len(failed) == 2


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("which", [1, 3])
def test_memory_that_runs_out_between_parts(which, k):
    """The parts before it were added already, and its own backward is half way through."""

    class Late(Small):
        def forward(self, x):
            self.room = 1 if len(self.sizes) == which else 9
            return super().forward(x)

    learns = [learner(data_of([8, 8, 4]), model=model) for model in (Small(), Late(where="backward"))]
    micro = AutoMicrobatch(4)
    learns[0].fit(0.3, accumulate=k)
    learns[1].fit(0.3, accumulate=k, callbacks=[micro])
    assert micro.current_size == 2
    assert_same_weights(*learns)
    assert learns[1].recorder.losses == pytest.approx(learns[0].recorder.losses, rel=1e-9)
    assert learns[1].recorder.epochs[0]["train_loss"] == pytest.approx(learns[0].recorder.epochs[0]["train_loss"])


def test_no_size_is_small_enough():
    learn = learner(data_of([9]), model=Small(0), callbacks=[AutoMicrobatch(min_size=2)])
    start = bits(dict(learn.model.state_dict()))
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 1 GiB") as caught:
        learn.fit(0.1)
    assert learn.model.sizes == [9, 3, 1]  # the first of 1, of 3 and of 5 parts
    assert any("no memory for 2 of the batch's 9 samples at a time, and min_size=2" in note
               for note in caught.value.__notes__)  # fmt: skip
    assert bits(dict(learn.model.state_dict())) == start
    assert all(p.grad is None for p in learn.model.parameters())


def test_another_error_is_no_matter_of_memory():
    def other(n):
        raise RuntimeError("something else")

    learn = learner(data_of([4]), model=Small(0, error=other), callbacks=[AutoMicrobatch()])
    with pytest.raises(RuntimeError, match="something else"):
        learn.fit(0.1)
    assert learn.model.sizes == [4]


Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor


SHAPES = {
    "namedtuple": (lambda x, y: Pair(x, y), None),
    "dataclass": (lambda x, y: Data(x, y), None),
    "list": (lambda x, y: [x, y], None),
    "dict": (lambda x, y: {"x": x, "labels": y, "names": ["a"] * len(x), "temperature": torch.tensor(1.0)}, None),
    "nested": (lambda x, y: ((x,), {"y": y}), lambda pred, target: nn.functional.mse_loss(pred, target["y"])),
}


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_batches_of_any_shape(shape):
    make, loss_func = SHAPES[shape]
    data = [make(x, y) for x, y in data_of([5, 4])]
    learns = [learner(data, model=Small(), loss_func=loss_func or nn.MSELoss()) for _ in range(2)]
    learns[0].fit(0.3)
    learns[1].fit(0.3, callbacks=[AutoMicrobatch(2)])
    assert learns[1].model.sizes == [1, 2, 2, 2, 2]
    assert_same_weights(*learns)


@pytest.mark.parametrize("as_count", [int, torch.tensor])
@pytest.mark.parametrize("k", [1, 3])
def test_losses_with_a_count(as_count, k):
    """Weighted by a mask that leaves some parts empty."""
    data = [(x, (y, torch.arange(len(x)) % 4 == 0)) for x, y in data_of([8, 3, 5])]

    def loss_func(pred, target):
        y, mask = target
        return ((pred - y).square() * mask[:, None]).sum(), as_count(int(mask.sum()))

    learns = [learner(data, model=Small(), loss_func=loss_func) for _ in range(2)]
    learns[0].fit(0.3, accumulate=k)
    learns[1].fit(0.3, accumulate=k, callbacks=[AutoMicrobatch(2)])
    assert_same_weights(*learns)
    assert learns[1].recorder.losses == pytest.approx(learns[0].recorder.losses, rel=1e-9)


def test_callbacks_hear_each_part_and_then_of_the_whole():
    data, heard = data_of([7]), []

    def note(state):
        heard.append((len(state.batch[0]), state.n_samples, state.loss.item(), state.loss_weight, len(state.pred)))

    learn = learner(data, model=Small())
    with torch.no_grad():
        losses = (learn.model(data[0][0]) - data[0][1]).square().flatten().tolist()
    learn.fit(0.3, callbacks=[AutoMicrobatch(3), At("after_backward", note), At("after_batch", note)])
    wanted = [(2, losses[:2]), (2, losses[2:4]), (3, losses[4:]), (7, losses)]
    assert [(n, n, pytest.approx(np.mean(part)), n) for n, part in wanted] == [entry[:4] for entry in heard]
    assert [entry[4] for entry in heard] == [2, 2, 3, 3]


def test_a_part_that_is_cancelled_cancels_its_window():
    data = data_of([4, 4, 4, 4])
    learns = [learner(part, model=Small()) for part in (data, data[2:])]
    learns[0].fit(0.3, accumulate=2, callbacks=[AutoMicrobatch(2), At("after_loss", throw(CancelBatch), n=3)])
    learns[1].fit(0.3, accumulate=2)
    assert len(learns[0].opt.seen) == 1
    assert_same_weights(*learns)


def test_train_metrics_count_every_sample_once():
    seen = []

    def metric(pred, target):
        seen.append(len(pred))
        return (pred - target).abs().mean()

    learn = learner(data_of([8, 8]), model=Small(2, "backward"), metrics=[metric], train_metrics=True,
                    callbacks=[AutoMicrobatch()])  # fmt: skip
    learn.fit(0.1)
    assert seen == [2] * 8


def test_the_finder_needs_it_too_and_leaves_no_trace():
    micro = AutoMicrobatch()
    learn = learner(data_of([8] * 4), model=Small(2), callbacks=[micro])
    learn.lr_find(num_it=20)
    assert micro.current_size is None
    learn.fit(0.1)
    assert micro.current_size == 2


def test_all_of_the_toolbox_together():
    """fp16 arithmetic apart, which autocast leaves in float64: the by-hand clip of the big batch."""
    learns = [learner(data_of([4, 7, 5, 2, 6]), model=model) for model in (Small(), Small(3, "backward"))]
    learns[0].fit(0.3, 2, accumulate=2, callbacks=[GradientClip(norm=0.2)])
    learns[1].fit(0.3, 2, accumulate=2, callbacks=[GradientClip(norm=0.2), AutoMicrobatch(), MixedPrecision("fp16")])
    assert_same_weights(learns[1], learns[0])
    for name in ("grad_norm",):
        assert learns[1].recorder.column(name) == pytest.approx(learns[0].recorder.column(name), rel=1e-9)
    assert learns[0].recorder.column("grad_norm").min() > 0.2


# ---- taking batches apart


def test_parts_differ_by_one_sample_at_most():
    for n in range(1, 30):
        for size in range(1, 12):
            sizes = [len(part) for part in parts(torch.arange(n), n, size)]
            assert sum(sizes) == n
            assert max(sizes) <= size
            assert max(sizes) - min(sizes) <= 1
            assert len(sizes) == -(-n // size)
    assert torch.equal(torch.cat(parts(torch.arange(10), 10, 4)), torch.arange(10))


def test_what_is_kept_whole():
    whole = {"a": 1.5, "b": None, "c": "text", "d": torch.tensor(2.0), "e": torch.ones(1, 7), "f": np.float32(1)}
    first, second = parts((whole, torch.arange(4), np.arange(4)), 4, 2)
    assert first[0].keys() == whole.keys()
    for name, value in whole.items():
        assert first[0][name] is value
        assert second[0][name] is value
    assert first[2].tolist() == [0, 1]
    assert type(parts(collections.OrderedDict(x=torch.arange(2)), 2, 1)[0]) is collections.OrderedDict
    assert parts(Pair(0.5, None), 2, 1) == [Pair(0.5, None)] * 2


class Graph:
    def to(self, device):
        return self


@pytest.mark.parametrize(("batch", "error", "message"), [
    ((torch.ones(4, 3), torch.ones(6, 6)), ValueError, r"a batch of 4 samples cannot be split: it holds a tensor of "
                                                       r"shape \(6, 6\), whose first dimension is neither 4 nor 1"),
    ((Graph(), torch.ones(4)), TypeError, "a batch of 4 samples cannot be split: it holds a Graph, and nobody knows"),
])  # fmt: skip
def test_what_cannot_be_split(batch, error, message):
    with pytest.raises(error, match=message):
        parts(batch, 4, 2)


@pytest.mark.parametrize(("options", "message"), [
    ({"size": 0}, "size must be an int >= 1, got 0"),
    ({"size": 2.0}, "size must be an int >= 1, got 2.0"),
    ({"min_size": 0}, "min_size must be an int >= 1, got 0"),
    ({"size": 3, "min_size": 4}, "size must be an int >= 4, got 3"),
])  # fmt: skip
def test_what_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AutoMicrobatch(**options)


# ---- effective_batch_size


def test_effective_batch_size_is_accumulate():
    data = torch.randn(20, 3), torch.randn(20, 1)
    learns = [learner(TensorLoader(*data, batch_size=2)) for _ in range(3)]
    learns[0].fit(0.1, 2, accumulate=4)
    learns[1].fit(0.1, 2, effective_batch_size=8)
    learns[2].fit_one_cycle(2, 0.1, effective_batch_size=8)
    assert trained(learns[0]) == trained(learns[1])
    assert len(learns[0].opt.seen) == len(learns[2].opt.seen) == 6
    listed = learner(batches(4), opt_func=spying())
    listed.fit(0.1, effective_batch_size=8)
    assert len(listed.opt.seen) == 2


@pytest.mark.parametrize(("options", "message"), [
    ({"effective_batch_size": 9}, "effective_batch_size=9 is no multiple of the 4 samples in a batch. Pass e.g. 8 or"),
    ({"effective_batch_size": 3}, "effective_batch_size=3 is no multiple of the 4 samples in a batch. Pass e.g. 4"),
    ({"effective_batch_size": 8, "accumulate": 2}, "accumulate=2 and effective_batch_size=8 both say"),
    ({"effective_batch_size": 0}, "effective_batch_size must be an int >= 1, got 0"),
])  # fmt: skip
def test_effective_batch_size_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        learner().fit(0.1, **options)


def test_effective_batch_size_of_who_knows_what():
    with pytest.raises(ValueError, match=r"effective_batch_size=8 needs to know .*\(generator\) has no batch_size"):
        learner(iter_batches()).fit(0.1, effective_batch_size=8, steps_per_epoch=1)


def iter_batches():
    yield from batches(4)


def test_metrics_of_the_training_data_count_every_sample_once():
    seen = []

    def count(pred, target):
        seen.append(len(target))
        return pred.mean()

    class Small(nn.Linear):
        """No memory for more than 2 samples, from the second call on."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            if len(x) > 2 and self.calls > 1 and self.training:
                raise torch.OutOfMemoryError
            return super().forward(x)

    learn = learner(batches(4, 8), model=Small(3, 1), metrics=[count], train_metrics=True)
    learn.fit(0.01, 1, callbacks=[AutoMicrobatch(size=4)])
    assert sum(seen) == 32


@pytest.mark.parametrize("options", [{"accumulate": 4}, {"effective_batch_size": 8}])
def test_a_finder_in_a_fit_makes_the_same_updates(options):
    learn = learner(batches(12, 2))
    learn.fit(0.1, callbacks=[LRFinder(1e-4, 1e-2, 6)], **options)
    assert learn.recorder.lr_find.pass_length == 3
