"""k-NN as Wu et al. 2018 write it, counts of hits, and features of a data set."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyNet
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moco.data.views import normalize
from moco.evaluate.knn import count_correct, extract_features, knn_accuracy, knn_predict

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def loop_votes(features, bank, labels, classes: int, k: int, temperature: float):
    """Section 3.4 of arXiv:1805.01978 with plain floats: each of the k nearest neighbours, by
    cosine, adds exp(cosine / temperature) to its class. Shifted by 1 in the exponent."""
    votes = []
    for query in features.double().tolist():
        neighbours = []
        for row, label in zip(bank.double().tolist(), labels.tolist(), strict=True):
            cosine = math.fsum(a * b for a, b in zip(query, row, strict=True))
            neighbours.append((cosine, label))
        neighbours.sort(reverse=True)
        of_query = [0.0] * classes
        for cosine, label in neighbours[:k]:
            of_query[label] += math.exp((cosine - 1) / temperature)
        votes.append(of_query)
    return votes


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_classes_are_ranked_by_the_papers_votes(k, temperature):
    """The classes that neighbours have, in the order of their votes, k being capped at the size of
    the bank. In blocks as well."""
    classes = 7
    features, bank = unit(30, 4), unit(50, 4, seed=1)
    labels = torch.randint(0, classes, (50,), generator=torch.Generator().manual_seed(2))
    options = {"classes": classes, "k": k, "temperature": temperature}
    wanted = loop_votes(features, bank, labels, **options)
    for block_size in (1024, 7):
        ranked = knn_predict(features, bank, labels, block_size=block_size, **options)
        assert ranked.dtype == torch.int64 and ranked.shape == (30, classes)
        for row, votes in zip(ranked.tolist(), wanted, strict=True):
            with_votes = sorted((c for c in range(classes) if votes[c]), key=lambda c: -votes[c])
            assert row == with_votes + [-1] * (classes - len(with_votes))


def test_ties_give_one_of_the_tied_classes():
    """Equally near neighbours of two classes, of three: the third class is never before them."""
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([2, 0, 1])
    ranked = knn_predict(torch.tensor([[1.0, 0.0]]), bank, labels, classes=3, k=3)
    assert set(ranked[0, :2].tolist()) == {0, 2} and ranked[0, 2] == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30])
def test_a_tiny_temperature_does_not_overflow(temperature):
    """exp(1 / 0.001) is no float32; the nearest neighbour's class wins all the same."""
    features, bank = unit(20, 4), unit(40, 4, seed=1)
    labels = torch.arange(40) % 3
    ranked = knn_predict(features, bank, labels, classes=3, k=10, temperature=temperature)
    nearest = (features.double() @ bank.double().t()).argmax(dim=1)
    assert torch.equal(ranked[:, 0], labels[nearest])


@pytest.mark.parametrize("options", [{"k": 0}, {"k": -1}, {"temperature": 0}, {"temperature": -1}])
def test_k_and_temperature_must_be_positive(options):
    with pytest.raises(ValueError, match="k must be >= 1 and temperature > 0, got k="):
        knn_predict(unit(2, 4), unit(3, 4), torch.tensor([0, 1, 0]), classes=2, **options)


@pytest.mark.parametrize("temperature", [0.07, 1e-30])
def test_a_class_without_votes_is_in_no_top_5(temperature):
    """Three neighbours of classes 6 and 2, of eight: nothing else is among the first five."""
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([6, 2, 2, 5])
    queries = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    ranked = knn_predict(queries, bank, labels, classes=8, k=3, temperature=temperature)
    assert ranked.tolist() == [[6, 2, -1, -1, -1, -1, -1, -1]] * 8
    scores = knn_accuracy(
        (queries, torch.arange(8)), (bank, labels), classes=8, k=3, temperature=temperature
    )
    assert (scores["top1"], scores["top5"]) == (100 / 8, 200 / 8)
    assert count_correct(ranked, torch.full((8,), -1), (1, 5)).tolist() == [0, 0]


def test_count_correct_counts_targets_among_the_first_k():
    ranked = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 2, 0], [1, 0, 2]])
    targets = torch.tensor([2, 2, 2, 0])
    counts = count_correct(ranked, targets, (1, 2, 3))
    assert counts.tolist() == [1, 3, 4] and counts.dtype == torch.float64


# ---- Features of a data set ----------------------------------------------------------------------


def pixels(count: int, seed: int = 0) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return [(image, i % 3) for i, image in enumerate(images)]


def test_features_are_unit_rows_of_normalised_pixels_in_the_order_of_the_loader():
    torch.manual_seed(0)
    encoder = TinyNet(5).eval()
    data = pixels(7)
    features, labels = extract_features(
        encoder, DataLoader(data, batch_size=3), device=CPU, mean=MEAN, std=STD
    )
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert features.dtype == torch.float32 and not features.requires_grad
    images = normalize(torch.stack([image for image, _ in data]), MEAN, STD)
    torch.testing.assert_close(features, F.normalize(encoder(images), dim=1).detach())
    nothing = extract_features(encoder, [], device=CPU, mean=MEAN, std=STD)
    assert [len(rows) for rows in nothing] == [0, 0]


class Colour(nn.Module):
    """The mean colour of an image as its feature."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def coloured(colours: list[tuple[int, int, int]], labels: list[int]) -> DataLoader:
    images = [torch.tensor(c, dtype=torch.uint8).view(3, 1, 1).expand(3, 4, 4) for c in colours]
    return DataLoader(list(zip(images, labels, strict=True)), batch_size=2)


def test_knn_accuracy_in_percent_of_a_case_worked_by_hand():
    """Red, green and blue in the bank; three of four validation images are where they belong."""
    red, green, blue = (250, 10, 10), (10, 250, 10), (10, 10, 250)
    bank = coloured([red, green, blue], [0, 1, 2])
    val = coloured([(200, 20, 20), (20, 200, 20), (20, 20, 200), (190, 30, 30)], [0, 1, 2, 2])
    show = {"device": CPU, "mean": (0, 0, 0), "std": (1, 1, 1)}
    got = knn_accuracy(
        *(extract_features(Colour(), each, **show) for each in (val, bank)), classes=3
    )
    assert got == {"top1": 75.0, "top5": 100.0, "k": 3, "images": 4, "bank": 3}
