"""Texts given as tokens, and mixtures in place of embeddings: every text encoder reads them as it reads the text."""

import pytest
import torch
from torch.nn import functional as F

from bilevel_fast.attacking.states import Shifted
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.mini import MiniTextEncoder
from bilevel_fast.models.text_encoder import ClipTextEncoder, token_reader, token_states
from bilevel_fast.models.text_encoder_xl import XlTextEncoder
from bilevel_fast.worlds.mini import TEACHER

TEXTS = ["a red star in the style of waves", "a blue ring"]


@pytest.fixture(scope="module", params=["mini", "clip", "sdxl"])
def reader(request):
    if request.param == "mini":
        return token_reader(MiniTextEncoder.load(TEACHER))
    if request.param == "clip":
        return token_reader(ClipTextEncoder.load(request.getfixturevalue("sd")))
    return token_reader(XlTextEncoder.load(request.getfixturevalue("sdxl")))


def test_tokens_are_read_as_their_text(reader):
    tokens = [reader.tokens_of(text) for text in TEXTS]
    assert [reader.text_of(some) for some in tokens] == TEXTS
    torch.testing.assert_close(reader.read(tokens), reader.encode(TEXTS), rtol=1e-5, atol=1e-6)


def test_mixtures_stand_behind_the_begin_and_have_gradients(reader):
    tokens = [reader.tokens_of(text) for text in TEXTS]
    rows = torch.tensor([some[:2] for some in tokens])
    mixed = F.one_hot(rows, reader.vocabulary).float().requires_grad_(True)
    others = [[*reader.free()[:2].tolist(), *some[2:]] for some in tokens]
    states = reader.read(others, mixed)  # what the tokens say there is not read
    torch.testing.assert_close(states, reader.encode(TEXTS), rtol=1e-5, atol=1e-5)
    states.square().sum().backward()
    assert mixed.grad is not None
    assert mixed.grad.flatten(1).norm(dim=1).min() > 0
    torch.testing.assert_close(
        reader.read(tokens), reader.encode(TEXTS), rtol=1e-5, atol=1e-6
    )  # nothing is left behind


def test_what_begins_ends_and_pads_is_not_free(reader):
    free = reader.free()
    assert free.tolist() == sorted(set(free.tolist()))
    assert {token for text in TEXTS for token in reader.tokens_of(text)} <= set(free.tolist())
    torch.testing.assert_close(reader.read([[]])[:, : reader.length], token_states(reader, [""]), rtol=1e-5, atol=1e-6)
    assert len(free) < reader.vocabulary


@pytest.mark.situation
def test_too_many_tokens(reader):
    """A text given as tokens has more than the text encoder takes: refused, with how many it takes."""
    most = reader.length - 2
    assert reader.read([[int(reader.free()[0])] * most]).shape[1] >= reader.length
    with pytest.raises(UserError, match=f"a text has {most + 1} tokens; the text encoder takes {most}"):
        reader.read([[int(reader.free()[0])] * (most + 1)])


def test_an_encoder_of_texts_alone_is_refused(reader):
    with pytest.raises(UserError, match="Shifted reads texts alone"):
        token_reader(Shifted(reader, torch.zeros(reader.length, reader.width)))
