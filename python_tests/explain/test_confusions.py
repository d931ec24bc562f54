"""Confusions counted by hand."""

import csv

import pytest
import torch

from fgvc_ext.explain.confusions import (
    ConfusedPair,
    class_accuracy,
    confusable_group,
    confused_pairs,
    confusion_matrix,
    write_confusions_csv,
)

MATRIX = torch.tensor([[5, 3, 0, 0], [1, 7, 1, 0], [0, 1, 8, 0], [0, 0, 0, 0]])
NAMES = ("wren", "tit", "jay, blue", "owl")


def test_matrix_by_hand():
    target, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 2, 0, 0])
    matrix = confusion_matrix(target, predicted, 3)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]
    assert confusion_matrix(target[:0], predicted[:0], 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("name", ["target", "predicted"])
def test_label_out_of_range(bad, name):
    labels = {"target": torch.tensor([0, 1]), "predicted": torch.tensor([0, 1]), name: torch.tensor([0, bad])}
    with pytest.raises(IndexError, match=f"{name} holds label {bad}, there are 3"):
        confusion_matrix(labels["target"], labels["predicted"], 3)


def test_labels_of_different_length():
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        confusion_matrix(torch.zeros(3), torch.zeros(2), 2)


def test_pairs_join_both_directions():
    pairs = confused_pairs(MATRIX, NAMES)
    assert pairs == [
        ConfusedPair(0, 1, "wren", "tit", 3, 1, 4, 4 / 17),
        ConfusedPair(1, 2, "tit", "jay, blue", 1, 1, 2, 2 / 18),
    ]
    assert confused_pairs(MATRIX, NAMES, top=1) == pairs[:1]
    assert confused_pairs(torch.eye(4), NAMES) == []


def test_a_pair_that_is_confused_one_way_alone():
    forth, back = torch.diag(torch.tensor([4, 4])), torch.diag(torch.tensor([4, 4]))
    forth[0, 1] = back[1, 0] = 2
    assert confused_pairs(forth, NAMES[:2]) == [ConfusedPair(0, 1, "wren", "tit", 2, 0, 2, 0.2)]
    assert confused_pairs(back, NAMES[:2]) == [ConfusedPair(0, 1, "wren", "tit", 0, 2, 2, 0.2)]


def test_equal_counts_are_ordered_by_share_then_index():
    matrix = torch.diag(torch.tensor([9, 9, 2, 2, 2, 2]))
    matrix[0, 1] = matrix[2, 3] = matrix[4, 5] = 1
    assert [(pair.a, pair.b) for pair in confused_pairs(matrix, "abcdef")] == [(2, 3), (4, 5), (0, 1)]


def test_matrix_must_fit_the_names():
    with pytest.raises(ValueError, match=r"expected \[3,3\], got \[4, 4\]"):
        confused_pairs(MATRIX, NAMES[:3])


def test_class_accuracy():
    expected = torch.tensor([5 / 8, 7 / 9, 8 / 9, float("nan")], dtype=torch.float64)
    torch.testing.assert_close(class_accuracy(MATRIX), expected, equal_nan=True)


def test_group_grows_from_the_worst_pair():
    assert confusable_group(MATRIX, 2) == [0, 1]
    assert confusable_group(MATRIX, 3) == [0, 1, 2]
    assert confusable_group(MATRIX, 9) == [0, 1, 2]  # the owl is confused with nobody
    assert confusable_group(MATRIX, 1) == [1]
    assert confusable_group(torch.eye(4), 3) == []
    assert confusable_group(MATRIX, 0) == []


def test_csv_reads_back(tmp_path):
    file = write_confusions_csv(tmp_path / "confusions.csv", confused_pairs(MATRIX, NAMES))
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0].values()) == ["wren", "tit", "3", "1", "4", "0.235294"]
    assert rows[1]["class_b"] == "jay, blue"
