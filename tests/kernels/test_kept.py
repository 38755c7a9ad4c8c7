import pytest
import torch

from bilevel_kernels.kept import Kept, decoded

CPU = torch.device("cpu")


def test_one_list_for_the_batch():
    index = Kept.same(4, [0, 2]).index(width=3, batch=2, device=CPU)
    assert index.channels.tolist() == [[0, 1, 2, 6, 7, 8] + [8] * 10]
    assert index.counts.tolist() == [6]
    assert index.rows.tolist() == [0, 0]
    assert index.most == 6


def test_a_list_for_each_sample_is_stored_once():
    kept = Kept.per_sample(4, [[1], [0, 1, 2, 3], [1]])
    index = kept.index(width=1, batch=3, device=CPU)
    assert index.channels[:, :5].tolist() == [[1, 1, 1, 1, 1], [0, 1, 2, 3, 3]]
    assert index.counts.tolist() == [1, 4]
    assert index.rows.tolist() == [0, 1, 0]
    assert kept.mask(2, 3, CPU).int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [1] * 8, [0, 0, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize("kept", [Kept.same(4, [0, 2]), Kept.per_sample(4, [[1], [0, 1, 2, 3], [1]])])
def test_encoded_and_back(kept):
    assert decoded(tuple(kept.encoded())) == kept
    assert decoded(()) is None


def test_is_everything():
    assert Kept.same(3, range(3)).is_everything
    assert not Kept.per_sample(3, [[0, 1, 2], [0, 1]]).is_everything


def test_the_index_is_made_once():
    a, b = (Kept.same(4, [0, 2]).index(3, 2, CPU) for _ in range(2))
    assert a is b


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([2, 1], r"\[2, 1\] is not strictly ascending"),
        ([1, 1], r"\[1, 1\] is not strictly ascending"),
        ([0, 4], r"\[0, 4\] is not within 0..3"),
        ([-1, 2], r"\[-1, 2\] is not within 0..3"),
        ([], "an empty list"),
        ([0, 1.0], "not whole numbers"),
    ],
)
def test_bad_lists(kept, said):
    with pytest.raises(ValueError, match=said):
        Kept.same(4, kept)
    with pytest.raises(ValueError, match=said):
        Kept.per_sample(4, [[0], kept])


def test_bad_rows():
    with pytest.raises(ValueError, match="lists for 2 samples, the batch has 3"):
        Kept.per_sample(4, [[0], [1]]).samples(3)
    with pytest.raises(ValueError, match="row 2 of 1 lists"):
        Kept(4, ((0,),), (2,))
    with pytest.raises(ValueError, match="nothing says which sample"):
        Kept(4, ((0,), (1,)))
    with pytest.raises(ValueError, match="no list"):
        Kept(4, ())
