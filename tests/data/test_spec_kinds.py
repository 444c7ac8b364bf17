"""Video, tokens and triples: what a sample is, what is refused, and that the one datamodule serves them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowbench.data import (
    Column,
    DatasetEntry,
    DataSpec,
    FlowDataModule,
    GraphSpec,
    Spec,
    Split,
    TokenSpec,
    VideoSpec,
    catalogue,
)
from flowbench.families import OTCFM, FlowMatching
from flowbench.networks import MLP

VIDEO = VideoSpec("clips", "1", (3, 2, 4, 5), levels=256)
TOKENS = TokenSpec("text", "2", (7,), 3, num_values=11)
GRAPH = GraphSpec("family", "1", num_entities=9, num_relations=4)
SPECS = [DataSpec("images", "1", (2, 4, 5), levels=17), DataSpec("points", "1", (3,)), VIDEO, TOKENS, GRAPH]


def test_what_they_are() -> None:
    assert [spec.shape for spec in SPECS] == [(2, 4, 5), (3,), (3, 2, 4, 5), (7,), (3,)]
    assert [spec.num_dims for spec in SPECS] == [40, 3, 120, 7, 3]
    assert [spec.grid for spec in SPECS] == [(4, 5), (), (4, 5), (), ()]
    assert [spec.levels for spec in SPECS] == [17, None, 256, None, None]
    assert [spec.modality for spec in SPECS] == ["image", "vector", "video", "tokens", "graph"]
    assert [spec.summary for spec in SPECS] == [
        "images 2x4x5",
        "vectors of 3",
        "clips 3x2x4x5",
        "tokens 7",
        "triples of 9 entities in 4 relations",
    ]


def test_the_identity_of_vectors_and_images_is_that_of_before_there_were_kinds() -> None:
    assert json.dumps(SPECS[0].identity) == (
        '{"dataset": "images", "version": "1", "shape": [2, 4, 5], "classes": null, "levels": 17, "units": null}'
    )


def test_identities_tell_apart_whatever_differs() -> None:
    others: list[Spec] = [
        *SPECS,
        DataSpec("clips", "1", (2, 4, 5), levels=256),
        VideoSpec("clips", "1", (3, 2, 4, 5), levels=16),
        DataSpec("text", "2", (7,), 3),
        TokenSpec("text", "2", (7,), 3, num_values=12),
        TokenSpec("text", "2", (7,), num_values=11),
        TokenSpec("text", "2", (1, 7), 3, num_values=11),
        TokenSpec("text", "3", (7,), 3, num_values=11),
        GraphSpec("family", "1", num_entities=9, num_relations=5),
        GraphSpec("family", "1", num_entities=10, num_relations=4),
    ]
    assert len({json.dumps(spec.identity, sort_keys=True) for spec in others}) == len(others)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: VideoSpec("v", "1", (3, 4, 5)), r"v: shape must be \(T, C, H, W\), got \(3, 4, 5\)"),
        (lambda: TokenSpec("t", "1", (3, 4, 5), num_values=2), r"t: shape must be \(L,\) or \(H, W\), got \(3, 4, 5\)"),
        (lambda: TokenSpec("t", "1", (3,), num_values=1), r"t: num_values must be a whole number in \[2, "),
        (lambda: GraphSpec("g", "1", num_entities=1, num_relations=1), "g: num_entities must be a whole number"),
        (lambda: DataSpec("d", "1", (3, 4)), r"d: shape must be \(d,\) or \(C, H, W\), got \(3, 4\)"),
    ],
)
def test_what_they_cannot_be(make: Callable[[], Spec], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        make()


@pytest.mark.parametrize(
    ("spec", "values", "expected"),
    [
        (TOKENS, torch.full((2, 7), 11), "text: tokens must lie in 0..10, got 11..11"),
        (TOKENS, torch.full((2, 7), -1), "text: tokens must lie in 0..10, got -1..-1"),
        (
            TOKENS,
            torch.zeros(2, 7),
            "text: tokens 7 are int64 of shape (N, 7), but the data hold float32 of shape (2, 7)",
        ),
        (TOKENS, torch.zeros(2, 6).long(), "but the data hold int64 of shape (2, 6)"),
        (GRAPH, torch.tensor([[0, 3, 8], [9, 0, 0]]), "family: heads and tails must lie in 0..8, got 0..9"),
        (GRAPH, torch.tensor([[0, 4, 8]]), "family: relations must lie in 0..3, got 4..4"),
        (VIDEO, torch.zeros(2, 2, 4, 5).byte(), "clips 3x2x4x5 are uint8 of shape (N, 3, 2, 4, 5)"),
        (SPECS[0], torch.full((2, 2, 4, 5), 17).byte(), "images: levels must lie in 0..16, got 17..17"),
        (SPECS[1], torch.zeros(2, 3).double(), "points: vectors of 3 are float32 of shape (N, 3)"),
    ],
)
def test_values_of_another_kind_are_refused(spec: Spec, values: torch.Tensor, expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        spec.check_values(values)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_of_the_right_kind_are_taken() -> None:
    rng = torch.Generator().manual_seed(0)
    VIDEO.check_values(torch.randint(0, 256, (2, 3, 2, 4, 5), generator=rng).byte())
    TOKENS.check_values(torch.randint(0, 11, (5, 7), generator=rng))
    GRAPH.check_values(torch.tensor([[8, 3, 8], [0, 0, 0]]))
    TOKENS.check_values(torch.zeros(0, 7).long())


def test_the_picture_of_a_clip_is_its_frames_side_by_side() -> None:
    k = torch.randint(0, 256, (2, 3, 2, 4, 5), generator=torch.Generator().manual_seed(0)).byte()
    picture = VIDEO.to_picture(VIDEO.to_model(k))
    assert picture.shape == (2, 2, 4, 15)
    for number in range(3):
        assert torch.equal(picture[..., 5 * number : 5 * (number + 1)], k[:, number])


def test_the_picture_of_an_image_is_the_image_and_others_have_none() -> None:
    image = DataSpec("grey", "1", (1, 2, 2), levels=256)
    k = torch.tensor([[[[0, 7], [9, 255]]]]).byte()
    assert torch.equal(image.to_picture(image.to_model(k)), k)
    for spec in (SPECS[1], TOKENS, GRAPH):
        with pytest.raises(ValueError, match="picture"):
            spec.to_picture(torch.zeros(1, *spec.shape))


# --- one datamodule


@pytest.fixture
def module_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FlowDataModule]:
    def make(spec: Spec, values: torch.Tensor, columns: dict[str, Column] | None = None, **options: Any) -> Any:
        catalogue.list_datasets()
        tails = {"known": values[:, :1]} if columns else {}
        label = None if spec.num_classes is None else torch.arange(len(values)) % spec.num_classes
        splits = {name: Split(values, label, tails) for name in ("train", "val", "test")}

        def load(root: Path) -> dict[str, Split]:
            return splits

        entry = DatasetEntry(spec, "mine", "mine", "me", load, columns=columns or {}, flips=True)
        monkeypatch.setitem(catalogue._entries, spec.name, entry)
        return FlowDataModule(spec.name, batch_size=4, **options)

    return make


def test_tokens_come_in_batches_as_they_are(module_of: Any) -> None:
    values = torch.arange(70).view(10, 7) % 11
    data = module_of(TOKENS, values)
    batch = data.train_batch_at(0)
    assert batch.x.dtype == torch.int64
    assert torch.equal(batch.x, values[batch.index])
    assert torch.equal(torch.cat([batch.x for batch in data.val_dataloader()]), values)
    with pytest.raises(ValueError, match="random_flip: 'text' holds tokens, which have no mirror image"):
        FlowDataModule("text", random_flip=True)


def test_triples_come_with_their_known_tails(module_of: Any) -> None:
    values = torch.stack([torch.arange(8), torch.arange(8) % 4, torch.arange(8) + 1], dim=1)
    batch = module_of(GRAPH, values, {"known": Column((1,))}).train_batch_at(0)
    assert torch.equal(batch.columns["known"], batch.x[:, :1])
    with pytest.raises(ValueError, match=r"^family: heads and tails must lie in 0\.\.8, got 0\.\.9$"):
        module_of(GRAPH, values + torch.tensor([0, 0, 1])).split("train")


def test_clips_are_dequantised_and_mirrored_as_a_whole(module_of: Any) -> None:
    values = torch.randint(0, 256, (10, 3, 2, 4, 5), generator=torch.Generator().manual_seed(0)).byte()
    data = module_of(VIDEO, values, random_flip=True)
    mirrored = 0
    for position in range(0, 40, 4):
        batch = data.train_batch_at(position)
        for found, original in zip(data.spec.quantize(batch.x), values[batch.index], strict=True):
            assert torch.equal(found, original) != torch.equal(found, original.flip(-1))
            mirrored += torch.equal(found, original.flip(-1))
    assert 8 < mirrored < 32  # of 40


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": Split(torch.zeros(4, 3))}, "points: the split 'test' is missing; load must give train, val, test"),
        (
            dict.fromkeys(("train", "val", "test"), Split(torch.zeros(4, 3), torch.zeros(4).long())),
            "points: 'train' has labels, but spec.num_classes is None; make them agree",
        ),
        (
            dict.fromkeys(("train", "val", "test"), Split(torch.zeros(4, 2))),
            "points: vectors of 3 are float32 of shape (N, 3), but the data hold float32 of shape (4, 2)",
        ),
    ],
)
def test_what_an_entry_loads_must_be_what_it_says(splits: dict[str, Split], expected: str) -> None:
    entry = DatasetEntry(SPECS[1], "mine", "mine", "me", lambda root: splits)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        entry.check_splits(entry.load(Path()))


def test_labels_out_of_range_are_refused() -> None:
    split = Split(torch.zeros(4, 7).long(), torch.arange(4))
    entry = DatasetEntry(TOKENS, "mine", "mine", "me", lambda root: {})
    with pytest.raises(ValueError, match=r"^text: labels of 'train' must lie in 0\.\.2, got 0\.\.3$"):
        entry.check_splits(dict.fromkeys(("train", "val", "test"), split))


@pytest.mark.parametrize("family", [FlowMatching, OTCFM])
def test_flows_refuse_what_is_no_vector_or_image(family: Any) -> None:
    with pytest.raises(ValueError, match=f"^{family.__name__} models vectors and images, but text holds tokens 7$"):
        family(TOKENS, MLP)


def test_a_split_of_another_size_than_declared_is_refused() -> None:
    splits = dict.fromkeys(("train", "val", "test"), Split(torch.zeros(4, 3)))
    entry = DatasetEntry(
        SPECS[1], "mine", "mine", "me", lambda root: splits, num_samples={"train": 4, "val": 5, "test": 4}
    )
    with pytest.raises(ValueError, match=r"^points: 'val' has 4 samples, but num_samples declares 5; make them agree$"):
        entry.check_splits(splits)
