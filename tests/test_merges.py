"""Several merges in one prompt: of pictures, videos and sound, in one graph or over several, by different operations."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor

import parvts_fx
from parvts_fx import scores
from parvts_fx.analysis import merge, modality
from parvts_fx.errors import ParvtsWarning
from tests.comparing import TOLERANCE
from tests.plain import IMAGE_TOKEN, Plain, Row, Specification, merged, prompt
from tests.plain import Attending as ThreeModalities
from tests.plain_reference import largest_error, reference
from tests.plain_specification import SOUND_TOKEN, VIDEO_TOKEN

SPEC = Specification(
    layers=3, length=19, visual=7, video=True, sound=4, rows=(Row(before=2), Row(before=3)), attention="masked")
OPTIONS = dict(migration_depth=1, keep_tokens=2, score="norm", lowering="eager")


class Merging(ThreeModalities):
    """Merges one after another, each in its own way, and breaks the graph where it is asked to.

    Args:
        ways: how pictures, videos and sound are merged.
        breaks: how many merges are done where the graph breaks.
        copies: the embeddings are copied outside of any graph behind the first merge.
    """

    def __init__(self, ways: tuple[str, str, str], breaks: tuple[int, ...] = (), copies: bool = False, spec=SPEC):
        super().__init__(spec)
        self.ways, self.breaks, self.copies = ways, breaks, copies

    def decode(self, ids: Tensor, mask: Tensor, merges, cached=()):
        (first, one), (second, two), (third, three) = merges
        x = self.tokens(ids)
        if 0 in self.breaks:  # no loop: Dynamo does not go on in the middle of one
            torch._dynamo.graph_break()
        x = self.merge(x, ids, first, one)
        if 1 in self.breaks:
            torch._dynamo.graph_break()
        if self.copies:
            x = copied(x)
        x = self.merge(x, ids, second, two)
        if 2 in self.breaks:
            torch._dynamo.graph_break()
        x = self.merge(x, ids, third, three)
        if 3 in self.breaks:
            torch._dynamo.graph_break()
        self.ready = x
        return super().decode(ids, mask, [])

    def merge(self, x: Tensor, ids: Tensor, token: int, features: Tensor) -> Tensor:
        return merged(dict(zip((IMAGE_TOKEN, VIDEO_TOKEN, SOUND_TOKEN), self.ways))[token], x, ids == token, features)

    def behind_merge(self, x: Tensor) -> Tensor:
        return self.ready


@torch._dynamo.disable
def copied(x: Tensor) -> Tensor:
    return x.clone()


def build(
    ways: tuple[str, str, str], breaks: tuple[int, ...] = (), copies: bool = False, *, by_string: bool = False,
    strict: bool = True, spec: Specification = SPEC, **options,
) -> Merging:
    model = Merging(ways, breaks, copies, spec).eval().requires_grad_(False)
    given = OPTIONS | {"strict": strict} | options
    if by_string:
        model.compile(backend="parvts", options=given)
    else:
        parvts_fx.compile(model, **given)
    return model


def error_of(model: Merging, seed: int = 1, spec: Specification = SPEC) -> float:
    given = prompt(spec, seed)
    with torch.no_grad():
        wanted = reference(model, given, scores.norm, migration_depth=1, keep_tokens=2)
        return largest_error(model(*given.arguments), wanted, True)


every_way = pytest.mark.parametrize("ways", [
    ("scatter", "scatter", "scatter"), ("scatter", "assign", "choose"), ("put", "scatter", "assign"),
    ("choose the text", "put", "scatter")], ids=" ".join)


@pytest.mark.supports(
    "Prompts", "pictures, videos and sound in one prompt, merged by different operations; sound stays like text")
@every_way
@pytest.mark.parametrize("sound_first", [False, True], ids=["seen first", "heard first"])
def test_modalities_in_one_graph(ways, sound_first):
    spec = dataclasses.replace(SPEC, sound_first=sound_first)
    assert error_of(build(ways, spec=spec), spec=spec) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.supports("Graphs", "graph breaks between the merges of pictures, videos and sound")
@pytest.mark.parametrize("by_string", [True, False], ids=["string", "compile"])
@pytest.mark.parametrize("breaks", [(1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("sound_first", [False, True], ids=["seen first", "heard first"])
def test_breaks_between_merges(by_string, breaks, sound_first):
    spec = dataclasses.replace(SPEC, sound_first=sound_first)
    model = build(("scatter", "scatter", "assign"), breaks, by_string=by_string, spec=spec)
    for visual, seed in ((7, 1), (7, 2), (5, 3)):
        changed = dataclasses.replace(spec, visual=visual)
        assert error_of(model, seed, changed) <= TOLERANCE


@every_way
def test_ways_behind_breaks(ways):
    assert error_of(build(ways, (0, 1, 2))) <= TOLERANCE


@pytest.mark.parametrize("by_string", [True, False], ids=["string", "compile"])
def test_a_copy_between_merges_is_told(by_string):
    """What has been merged cannot be followed through code that no graph holds: then all tokens stay, with the reason."""
    model = build(("scatter", "scatter", "scatter"), copies=True, by_string=by_string, strict=False)
    given = prompt(SPEC)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        actual = model(*given.arguments)[0]
    assert actual.shape[1] == SPEC.length
    assert any(issubclass(one.category, ParvtsWarning) and "unrewritten" in str(one.message) for one in told)
    wanted = Merging(model.ways)
    wanted.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(actual, wanted(*given.arguments)[0])


@pytest.mark.supports("Options", "which modalities are pruned: pictures, videos, sound")
@pytest.mark.parametrize("prune, tokens", [
    ("visual", (IMAGE_TOKEN, VIDEO_TOKEN)), ("all", (IMAGE_TOKEN, VIDEO_TOKEN, SOUND_TOKEN)), (("image",), (IMAGE_TOKEN,)),
    (("video", "audio"), (VIDEO_TOKEN, SOUND_TOKEN)), (["audio"], (SOUND_TOKEN,))])
@pytest.mark.parametrize("breaks", [(), (1, 2)], ids=["whole", "broken"])
def test_what_is_pruned(prune, tokens, breaks):
    model = build(("scatter",) * 3, breaks, prune=prune)
    given = prompt(SPEC)
    count = int(torch.isin(given.ids[0], torch.tensor(tokens)).sum())
    with torch.no_grad():
        logits = model(*given.arguments)[0]
        assert logits.shape[1] == SPEC.length - count + 2
        choice = _Chosen(*dataclasses.astuple(given), tokens)
        wanted = reference(model, choice, scores.norm, migration_depth=1, keep_tokens=2)
        assert largest_error(model(*given.arguments), wanted, True) <= TOLERANCE


class _Chosen:
    """A prompt of which tokens of some modalities count as visual."""

    def __init__(self, ids, features, mask, video, sound, cached, tokens):
        self.ids, self.features, self.mask, self.video, self.sound, self.cached = ids, features, mask, video, sound, cached
        self.visual = torch.isin(ids, torch.tensor(tokens))


class Hearing(ThreeModalities):
    """Sound alone, and a graph break if it is asked for."""

    def __init__(self, spec: Specification, breaks: bool):
        super().__init__(spec)
        self.breaks = breaks

    def forward(self, ids, input_features, mask):
        x = self.tokens(ids)
        x = x.masked_scatter((ids == SOUND_TOKEN)[..., None], self.hearing(input_features))
        if self.breaks:
            torch._dynamo.graph_break()
        self.ready = x
        return self.decode(ids, mask, [])

    def behind_merge(self, x):
        return self.ready


@pytest.mark.parametrize("by_string", [True, False], ids=["string", "compile"])
@pytest.mark.parametrize("breaks", [False, True], ids=["whole", "broken"])
def test_sound_alone_is_left_alone_silently(by_string, breaks):
    model = Hearing(SPEC, breaks).eval().requires_grad_(False)
    given = prompt(SPEC)
    ids = torch.where(given.visual, 5, given.ids)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", ParvtsWarning)
        wanted = model(ids, given.sound, given.mask)[0]
        if by_string:
            model.compile(backend="parvts", options=OPTIONS | {"strict": True})
        else:
            parvts_fx.compile(model, **OPTIONS, strict=True)
        for _ in range(2):
            torch.testing.assert_close(model(ids, given.sound, given.mask)[0], wanted)


class Together(ThreeModalities):
    """All modalities in one tensor of features and one merge."""

    def forward(self, ids, pixel_values, mask, pixel_values_videos, input_features):
        x = self.tokens(ids)
        features = torch.cat([self.projection(pixel_values), self.projection(pixel_values_videos),
                              self.hearing(input_features)])
        self.ready = x.masked_scatter(torch.isin(ids, ids.new_tensor([IMAGE_TOKEN, VIDEO_TOKEN, SOUND_TOKEN]))[..., None],
                                      features)
        return self.decode(ids, mask, [])

    def behind_merge(self, x):
        return self.ready


def test_one_merge_of_pictures_and_sound_is_refused():
    model = Together(dataclasses.replace(SPEC, rows=(Row(),))).eval().requires_grad_(False)
    given = prompt(model.spec)
    parvts_fx.compile(model, **OPTIONS)
    with torch.no_grad(), pytest.warns(ParvtsWarning, match="audio and image and video together"):
        assert model(*given.arguments)[0].shape[1] == SPEC.length
    torch._dynamo.reset()
    parvts_fx.compile(model, **OPTIONS, prune="all", strict=True)
    with torch.no_grad():
        assert model(*given.arguments)[0].shape[1] == SPEC.length - 11 + 2


class Joined(ThreeModalities):
    """Features joined to the text: sound, text, picture, text."""

    def forward(self, ids, pixel_values, mask, pixel_values_videos, input_features):
        x, heard, seen = self.tokens(ids), self.hearing(input_features)[None], self.projection(pixel_values)[None]
        self.ready = torch.cat([x[:, :2], heard, x[:, 6:9], seen, x[:, 12:]], 1)
        return self.decode(ids, mask, [])

    def behind_merge(self, x):
        return self.ready


def test_joined_features_are_told_apart():
    spec = dataclasses.replace(SPEC, rows=(Row(),), sound_first=True)
    model = Joined(spec).eval().requires_grad_(False)
    given = prompt(spec)
    parvts_fx.compile(model, **OPTIONS, strict=True)
    with torch.no_grad():
        assert model(*given.arguments)[0].shape[1] == SPEC.length - 3 + 2
    found = parvts_fx.explain(model, *given.arguments, options=OPTIONS).merges
    assert {(one.modality, one.tokens, one.prunable) for one in found} == {("image", 3, True), ("audio", 4, False)}


@pytest.mark.parametrize("breaks", [(), (1, 2)], ids=["whole", "broken"])
def test_explain_lists_every_merge(breaks):
    model = Merging(("scatter", "assign", "choose"), breaks).eval().requires_grad_(False)
    report = parvts_fx.explain(model, *prompt(SPEC).arguments, options=OPTIONS)
    assert [(one.modality, one.tokens, one.prunable) for one in report.merges] == [
        ("image", 3, True), ("video", 4, True), ("audio", 4, False)]
    assert [one.evidence for one in report.merges] == ["pixel_values", "pixel_values_videos", "input_features"]
    assert report.prefill.visual_tokens == 7
    assert "no, like text" in str(report) and "input_features" in str(report)


def test_where_nothing_tells_it_is_visual_and_said_so():
    spec = Specification(attention="masked")
    report = parvts_fx.explain(Plain(spec), *prompt(spec).arguments, options=OPTIONS)
    (found,) = report.merges
    assert (found.modality, found.tokens, found.prunable, found.evidence) == ("unknown", 5, True, "")
    assert "taken for visual" in str(report)


@pytest.mark.parametrize("given, closest", [
    ("visula", "visual"), (("imag",), "image"), (("visual",), None), ((), None), (3, None)])
def test_bad_choices(given, closest):
    with pytest.raises(ValueError, match="option prune=") as raised:
        parvts_fx.Options(prune=given)
    assert closest is None or f'"{closest}"?' in str(raised.value)


@pytest.mark.parametrize("name, modalities", [
    ("L['pixel_values']", {"image"}), ("L['pixel_values_videos']", {"video"}), ("l_kwargs_input_features_", {"audio"}),
    ("L['kwargs']['mm_encoder_outputs']['image'].pooler_output", {"image"}), ("L['audio_values']", {"audio"}),
    ("L['___stack0'].pooler_output", set()), ("L['features']", set()), ("L['inputs_embeds']", set())])
def test_names_of_inputs(name, modalities):
    assert modality.named(name).modalities == modalities


def test_a_graph_that_was_compiled_before_something_was_handed_to_it():
    """The same graph for a prompt with a video alone, and then for one into which a picture has been merged before."""
    given = prompt(SPEC)
    model = Optional().eval().requires_grad_(False)
    reference_model = Merging(("scatter",) * 3)
    reference_model.load_state_dict(model.state_dict())
    parvts_fx.compile(model, **OPTIONS, strict=True)
    video_alone = torch.where(given.ids == IMAGE_TOKEN, 5, given.ids)
    with torch.no_grad():
        assert model(video_alone, None, given.mask, given.video, given.sound)[0].shape[1] == SPEC.length - 4 + 2
        wanted = reference(reference_model, given, scores.norm, migration_depth=1, keep_tokens=2)
        assert largest_error(model(*given.arguments), wanted, True) <= TOLERANCE


class Optional(Merging):
    """The picture may be missing, which no graph behind the first break is told."""

    def __init__(self):
        super().__init__(("scatter",) * 3)

    def forward(self, ids, pixel_values, mask, pixel_values_videos, input_features):
        x = self.tokens(ids)
        if pixel_values is not None:
            x = self.merge(x, ids, IMAGE_TOKEN, self.projection(pixel_values))
        return self.rest(x, ids, mask, pixel_values_videos, input_features)

    def rest(self, x, ids, mask, pixel_values_videos, input_features):
        torch._dynamo.graph_break()
        x = self.merge(x, ids, VIDEO_TOKEN, self.projection(pixel_values_videos))
        self.ready = self.merge(x, ids, SOUND_TOKEN, self.hearing(input_features))
        return ThreeModalities.decode(self, ids, mask, [])


# -- injected bugs ---------------------------------------------------------------------------------------------------


def test_a_missed_merge_is_found_by_the_comparison(monkeypatch):
    held = merge.Stream.accept
    monkeypatch.setattr(merge.Stream, "accept", lambda self, node: None if self.into else held(self, node))
    with pytest.raises(parvts_fx.NotRewritten, match="samples of a batch"):  # a second merge deals its features out in turn
        error_of(build(("scatter",) * 3))


def test_sound_taken_for_visual_is_found_by_the_comparison(monkeypatch):
    monkeypatch.setattr(modality, "origin_of", lambda *_: modality.Origin())
    monkeypatch.setattr(merge, "origin_of", lambda *_: modality.Origin())
    assert error_of(build(("scatter",) * 3)) > 1e-3
