"""Chapter 6: distances against oracles, extractors, inputs, and the command line."""

import json
import math
import re
import socket
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

import minigen.__main__ as command_line
from minigen import metrics, runs
from minigen.checkpoints import SHIPPED, save_checkpoint
from minigen.features import (
    LOSS_NETWORK,
    MEASURING_NETWORK,
    FeatureConfig,
    FeatureNetwork,
    fingerprint,
)
from minigen.files import read_json, write_json
from minigen.metrics import (
    ImageSource,
    Statistics,
    bits_per_dimension,
    bits_per_token,
    class_accuracy,
    diversity,
    evaluate_images,
    fine_detail,
    format_report,
    frechet_distance,
    horizontal_bias,
    inception_score,
    kernel_distance,
    load_extractor,
    mood_accuracy,
    nearest_neighbors,
    precision_recall,
    read_images,
    statistics,
)
from minigen.vq import VQConfig, VQModel

HASHES = {LOSS_NETWORK: "f41e4df585a04c36", MEASURING_NETWORK: "57fb3a3b0a18ef01"}


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_, **__):
        raise OSError("this test has no network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def minigen(capsys):
    def run(*arguments, status=0):
        assert command_line.main([str(argument) for argument in arguments]) == status
        printed = capsys.readouterr()
        return printed.err if status else printed.out

    return run


@pytest.fixture(scope="module")
def tiny():
    """A small network with five features, so that a dozen images are enough."""
    torch.manual_seed(0)
    config = FeatureConfig(widths=(8, 8), dim=5, size=16)
    return load_extractor(FeatureNetwork(config).eval())


@pytest.fixture(scope="module")
def pictures():
    return torch.cat(list(read_images("landscapes:test", 16, 60)))


def gaussians(d, seed, n=400):
    order = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=order, dtype=torch.float64)
    noise = torch.randn(n, d, generator=order, dtype=torch.float64)
    return noise @ mixing + torch.randn(d, generator=order, dtype=torch.float64)


# ---- likelihood


def test_bits_of_distributions_of_known_entropy():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    drawn = torch.multinomial(p, 40_000, replacement=True)
    nats = -p.log()[drawn].mean().item()
    assert bits_per_token(nats) == pytest.approx(1.75, abs=0.02)
    uniform = 3 * 8 * 8 * math.log(256)
    assert bits_per_dimension(uniform, (3, 8, 8)) == pytest.approx(8)


# ---- Frechet distance


@pytest.mark.parametrize("d", [1, 2, 7])
def test_frechet_distance_of_gaussians_in_closed_form(d):
    """Equal axes: the means' distance squared, and that of the standard deviations."""
    a, b = torch.rand(2, d, dtype=torch.float64) + 0.1
    means = torch.randn(2, d, dtype=torch.float64)
    found = frechet_distance(Statistics(means[0], a.square().diag(), 10),
                             Statistics(means[1], b.square().diag(), 10))
    expected = (means[0] - means[1]).square().sum() + (a - b).square().sum()
    assert found == pytest.approx(expected.item())


@pytest.mark.parametrize("d", [2, 5, 40])
def test_frechet_distance_is_that_of_scipy(d):
    x, y = gaussians(d, 0), gaussians(d, 1)
    (m, s, _), (n, t, _) = statistics(x), statistics(y)
    torch.testing.assert_close(s, torch.cov(x.T))
    expected = ((m - n).square().sum() + s.trace() + t.trace()
                - 2 * np.trace(sqrtm((s @ t).numpy())).real)
    assert frechet_distance(x, y) == pytest.approx(expected.item())
    assert frechet_distance(y, x) == pytest.approx(expected.item())
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_finite_where_features_do_not_vary():
    x, y = gaussians(3, 0), gaussians(3, 1)
    x[:, 2] = y[:, 2] = 1.5
    assert frechet_distance(x, y) == pytest.approx(
        frechet_distance(x[:, :2], y[:, :2]), rel=1e-6)


# ---- kernel distance, precision and recall


def test_kernel_distance_is_the_sum_over_pairs():
    x, y = gaussians(3, 0, 9), gaussians(3, 1, 7)

    def mean(a, b, same):
        kernels = [(float(p @ q) / 3 + 1) ** 3 for i, p in enumerate(a)
                   for j, q in enumerate(b) if not (same and i == j)]
        return sum(kernels) / len(kernels)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_kernel_distance_has_no_bias_and_frechet_distance_has():
    draws = [(torch.randn(20, 4), torch.randn(20, 4)) for _ in range(200)]
    kernel = torch.tensor([kernel_distance(*pair) for pair in draws])
    frechet = torch.tensor([frechet_distance(*pair) for pair in draws])
    error = kernel.std() / len(draws) ** 0.5
    assert abs(kernel.mean()) < 4 * error
    assert frechet.mean() > 0.2


def test_kernel_distance_of_subsets_is_near_that_of_all():
    x, y = gaussians(3, 0), gaussians(3, 1)
    found = kernel_distance(x, y, subset_size=200, subsets=50)
    assert found == kernel_distance(x, y, subset_size=200, subsets=50)
    assert found == pytest.approx(kernel_distance(x, y), rel=0.1)
    with pytest.raises(ValueError, match="subsets of 500 cannot be drawn from 400"):
        kernel_distance(x, y, subset_size=500)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k):
    x, y = torch.randn(30, 2).double(), torch.randn(40, 2).double() * 2

    def share(points, centers):
        radius = [sorted((c - d).norm() for d in centers)[k] for c in centers]
        return sum(any((p - c).norm() <= r for c, r in zip(centers, radius))
                   for p in points) / len(points)

    assert precision_recall(x, y, k) == pytest.approx((share(x, y), share(y, x)))
    assert precision_recall(x, x, k) == (1, 1)


class EightBitImages(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = (images * 255).round().byte()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_torch_fidelity_and_torchmetrics_agree(tiny, pictures):
    """Through their own paths from 8-bit images to figures, with our network inside."""
    from torch_fidelity import calculate_metrics, register_feature_extractor
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Tiny(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = tiny

        def forward(self, images):
            return (self.network(images / 255),)

        @staticmethod
        def get_provided_features_list():
            return ("tiny",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "tiny"

        @staticmethod
        def can_be_compiled():
            return False

    register_feature_extractor("tiny", Tiny)
    ours, real = pictures[:30], pictures[30:].flip(-2)
    x, y = tiny(ours), tiny(real)
    theirs = calculate_metrics(
        input1=EightBitImages(ours), input2=EightBitImages(real),
        feature_extractor="tiny", fid=True, kid=True, prc=True, kid_subset_size=30,
        kid_subsets=1, cuda=False, batch_size=8, verbose=False, cache=False,
        save_cpu_ram=True)
    fid = frechet_distance(x, y)
    assert theirs["frechet_inception_distance"] == pytest.approx(fid, rel=1e-4)
    assert theirs["kernel_inception_distance_mean"] == pytest.approx(
        kernel_distance(x, y), abs=1e-5)
    precision, recall = precision_recall(x, y)
    assert theirs["precision"] == pytest.approx(precision)
    assert theirs["recall"] == pytest.approx(recall)

    frechet = FrechetInceptionDistance(feature=tiny, normalize=True)
    kernel = KernelInceptionDistance(feature=tiny, normalize=True, subsets=1,
                                     subset_size=30)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(ours, real=False)
    assert frechet.compute().item() == pytest.approx(fid, rel=1e-4)
    assert kernel.compute()[0].item() == pytest.approx(  # in float32
        kernel_distance(x, y), abs=1e-5)


# ---- extractors


@pytest.mark.parametrize("name", sorted(HASHES))
def test_hash_of_a_shipped_network_is_fixed(name, offline):
    """Another hash is another measure: figures of before cannot be compared with it."""
    extractor = load_extractor(name)
    assert extractor.hash == HASHES[name] == extractor.network.fingerprint()
    assert extractor.dim == 64
    assert (SHIPPED / name / "model.safetensors").stat().st_size < 2**20


def test_the_network_that_measures_is_not_one_that_trains():
    assert load_extractor().hash == HASHES[MEASURING_NETWORK]
    assert load_extractor("landscapes-loss").hash == HASHES[LOSS_NETWORK]


def test_an_extractor_is_frozen_and_leaves_the_network_as_it_was(tiny, pictures):
    network = FeatureNetwork(FeatureConfig(widths=(8,), dim=3, size=16)).train()
    extractor = load_extractor(network).train()
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert not any(p.requires_grad for p in extractor.parameters())
    alone = torch.cat([extractor(image[None]) for image in pictures[:5]])
    torch.testing.assert_close(extractor(pictures[:5]), alone, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(pictures[:5]), extractor(pictures[:5]).float())
        torch.testing.assert_close(extractor(pictures[:5]), alone, rtol=1e-4, atol=1e-5)
    assert extractor.num_features == extractor.dim == 3
    assert load_extractor(extractor) is extractor
    other = FeatureNetwork(network.config)
    assert fingerprint(other) != fingerprint(network)


def test_an_extractor_from_a_path_and_from_any_module(tmp_path, pictures):
    network = FeatureNetwork(FeatureConfig(widths=(8,), dim=3, size=16)).eval()
    save_checkpoint(network, tmp_path)
    found = load_extractor(tmp_path)
    assert found.hash == network.fingerprint()
    torch.testing.assert_close(found(pictures[:4]), network(pictures[:4]).detach())
    pooled = load_extractor(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    assert (pooled.name, pooled.dim) == ("Sequential", 12)


@pytest.mark.parametrize(("name", "file"), [
    ("inception", r"weights-inception-2015-12-05-6726825d.pth \(96 MB\)"),
    ("dinov2", r"dinov2_vitl14_pretrain.pth \(1.2 GB\)")])
def test_missing_weights_are_one_sentence(name, file, offline, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=f"needs {file}.*copy it to .*checkpoints"):
        load_extractor(name)
    assert not list(tmp_path.rglob("*.pth"))


def test_inception_from_a_file(offline, tmp_path, monkeypatch):
    """The published architecture with random weights, where the hub looks for them."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = inception.FeatureExtractorInceptionV3("random", ["2048"])
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints"
               / inception.URL_INCEPTION_V3.split("/")[-1])
    extractor = load_extractor("inception")
    assert (extractor.name, extractor.dim) == ("inception", 2048)
    images = torch.rand(12, 3, 32, 32)
    network.features_list = ["2048", "logits_unbiased"]
    expected, logits = network((images * 255).round().byte())
    features = extractor(images)
    torch.testing.assert_close(features, expected)
    monkeypatch.setattr(metrics, "frechet_distance", lambda *_: 0.0)  # takes a while
    same = metrics.Measured(features, metrics.pixel_statistics(images))
    found = metrics.compare(same, same, extractor)
    assert found["Inception score"] == (
        pytest.approx(inception_score(logits), rel=1e-4), 12, 12)


# ---- what else is measured


def test_inception_score_is_that_of_its_definition_and_of_the_library():
    from torch_fidelity.metric_isc import isc_features_to_metric

    sure = 100 * torch.eye(5).repeat(8, 1)  # every image one of five classes
    assert inception_score(sure, splits=4) == pytest.approx(5)
    assert inception_score(sure[::5], splits=2) == pytest.approx(1), "one class"
    assert inception_score(torch.zeros(40, 5)) == pytest.approx(1), "unsure"
    logits = torch.randn(53, 7, generator=torch.Generator().manual_seed(0))
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    assert inception_score(logits) == pytest.approx(theirs["inception_score_mean"])
    with pytest.raises(ValueError, match=r"at least 10 images, found shape \(9, 7\)"):
        inception_score(logits[:9])


def test_accuracies_count_what_the_heads_say(tiny, pictures):
    features = tiny(pictures)
    classes, moods, _ = tiny.network.predict(features)
    assert class_accuracy(tiny.network, features, classes.argmax(1)) == 1
    assert mood_accuracy(tiny.network, features, moods.argmax(1)) == 1
    assert class_accuracy(tiny.network, features, classes.argmin(1)) == 0


def test_diversity_by_hand():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 1], [0, 3]])
    labels = torch.tensor([0, 0, 1, 1])
    distances = [5, 1, 3, math.hypot(3, 3), math.hypot(3, 1), 2]
    assert diversity(x) == pytest.approx(sum(distances) / 6)
    assert diversity(x, labels) == pytest.approx((5 + 2) / 2)
    with pytest.raises(ValueError, match="no two images have the same class"):
        diversity(x, torch.arange(4))


def test_nearest_neighbors_finds_copies(pictures):
    training, images = pictures[:40], pictures[40:].clone()
    images[3] = training[17]
    distance, index = nearest_neighbors(images, training.split(7))
    assert index[3] == 17
    assert distance[3] == pytest.approx(0, abs=1e-3)
    n = int(index[0])
    expected = (images[0] - training[n]).square().mean().sqrt().item()
    assert distance[0].item() == pytest.approx(expected, rel=1e-3)
    assert (distance[[0, 1, 2, 4]] > 0.01).all()


def test_horizontal_bias_has_the_sign_of_streaks(pictures):
    from minigen.pixelgpt import neighbor_correlation

    rows = torch.rand(8, 3, 16, 1).expand(-1, -1, -1, 16)
    rows = rows + 0.1 * torch.rand(8, 3, 16, 16)
    assert horizontal_bias(rows / 1.1, pictures) > 0.3
    assert horizontal_bias(rows.transpose(2, 3) / 1.1, pictures) < -0.3
    assert horizontal_bias(pictures, pictures) == 0
    found = [a - b for a, b in map(neighbor_correlation, (rows, pictures))]
    assert horizontal_bias(rows, pictures) == pytest.approx(found[0] - found[1],
                                                            abs=1e-4)


def test_fine_detail(pictures):
    from torchvision.transforms.functional import gaussian_blur

    assert fine_detail(pictures, pictures) == 1
    assert fine_detail(gaussian_blur(pictures, 7, 1.0), pictures) < 0.5
    assert fine_detail(pictures.mean(dim=(2, 3), keepdim=True).expand_as(pictures),
                       pictures) == pytest.approx(0, abs=1e-9)
    assert fine_detail(pictures / 2, pictures) == pytest.approx(0.25)


# ---- reading


def save(folder, images):
    for n, image in enumerate(images):
        file = folder / f"{n:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file)
    return folder


def pack(path, images, **more):
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=pixels, **more)
    return path


def test_the_same_images_from_everywhere(tmp_path, pictures, monkeypatch):
    folder, file = save(tmp_path / "a", pictures), pack(tmp_path / "a.npz", pictures)
    compressed = tmp_path / "b.npz"
    np.savez_compressed(compressed, **np.load(file))
    monkeypatch.setattr(np, "load", None)  # a file is read a part at a time
    almost = (pictures + 0.4 / 255).clamp(max=1)
    for source in (folder, str(file), compressed, pictures, list(pictures), almost,
                   (pictures * 255).round().byte()):
        found = read_images(source)
        assert (len(found), found.size) == (60, 16)
        for _ in range(2):
            assert torch.equal(torch.cat(list(found)), pictures)
    assert len(read_images(file, limit=7)) == 7
    assert torch.equal(torch.cat(list(read_images(folder, limit=7))), pictures[:7])


def test_images_of_another_size_are_resized_alike(tmp_path, pictures):
    found = [torch.cat(list(read_images(source, 8))) for source in (
        save(tmp_path / "a", pictures), pack(tmp_path / "a.npz", pictures), pictures)]
    assert found[0].shape == (60, 3, 8, 8)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_data_set_by_name_has_labels_and_moods():
    found = read_images("landscapes:val", 16, 20)
    assert (found.name, found.split, len(found)) == ("landscapes:val", "val", 20)
    assert len(found.labels) == len(found.moods) == 20
    assert read_images("landscapes", 16, 20).split == "val"


# ---- evaluate


def test_every_figure_carries_what_it_depends_on(tiny, pictures):
    report = evaluate_images(pictures[:30].flip(-2), "landscapes:val", tiny,
                             labels=torch.arange(30) % 9)
    figures = report["figures"]
    assert {"FD-FeatureNetwork", "KD-FeatureNetwork", "precision", "recall",
            "class accuracy", "diversity", "diversity within classes",
            "horizontal bias", "fine detail"} <= set(figures)
    for name, figure in figures.items():
        assert math.isfinite(figure["value"]), name
        assert (figure["N"], figure["M"]) == (30, 1000)
        assert (figure["reference"], figure["split"]) == ("landscapes:val", "val")
        assert (figure["floor_N"], figure["floor_images"]) == (30, "landscapes:test")
        assert figure["hash"] == tiny.hash
        assert figure["spread"] >= 0
    frechet = figures["FD-FeatureNetwork"]
    assert frechet["value"] > frechet["floor"] > 0
    json.dumps(report, allow_nan=False)
    shown = format_report(report)
    assert f"{frechet['floor']:.4f}" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_floor_of_a_folder_is_one_half_against_the_other(tmp_path, tiny, pictures):
    folder = save(tmp_path / "real", pictures)
    report = evaluate_images(pictures[:20], folder, tiny)
    figure = report["figures"]["FD-FeatureNetwork"]
    assert (figure["floor_N"], figure["M"]) == (20, 60)
    assert figure["floor_images"] == f"halves of {folder}"
    few = evaluate_images(pictures, pictures[:11], tiny)["figures"]["precision"]
    assert few["floor"] is few["floor_images"] is None
    assert "too few images for a floor" in format_report(
        evaluate_images(pictures, pictures[:11], tiny))


def test_the_seed_decides_the_subsets_and_nothing_else(tiny, pictures):
    a, b, again = (evaluate_images(pictures, pictures[:30].flip(-1), tiny, seed=seed)
                   for seed in (0, 1, 0))
    assert a == again
    name = "FD-FeatureNetwork"
    assert a["figures"][name]["value"] == pytest.approx(b["figures"][name]["value"])
    assert a["figures"][name]["spread"] != b["figures"][name]["spread"]
    assert a["subsets"] == 5


def test_spread_is_the_standard_error(tiny):
    """Of many draws of N, and from the subsets of one: within a factor of two."""
    real = torch.cat(list(read_images("landscapes:val", 16, 1000)))
    draws = [evaluate_images(real[n * 90:][:90].pow(2), real[-100:], tiny)
             for n in range(10)]
    figures = [draw["figures"]["FD-FeatureNetwork"] for draw in draws]
    spread = np.mean([figure["spread"] for figure in figures])
    actual = np.std([figure["value"] for figure in figures], ddof=1)
    assert 0.5 < spread / actual < 2


def test_copies_of_training_images_are_found(tiny, pictures):
    with pytest.raises(ValueError, match=r"labels \(20,\), .* found \(19,\)"):
        evaluate_images(pictures[:20], pictures, tiny, torch.zeros(19).long())
    same = ImageSource("train", len(pictures), pictures.shape[-1],
                       lambda: iter(pictures.split(20)))
    found = evaluate_images(pictures[:20], same, tiny, training=same)["figures"]
    assert found["nearest in training, pixels"]["floor"] is None, "no control"
    copies = evaluate_images(pictures[:20], pictures[20:], tiny, training=pictures)
    for kind in ("pixels", "features"):
        figure = copies["figures"][f"nearest in training, {kind}"]
        assert figure["value"] == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: frechet_distance(torch.randn(40, 64), torch.randn(90, 64)),
     "N = 40 images are too few for 64 features: give at least 65"),
    (lambda x: frechet_distance(torch.randn(1, 1), torch.randn(9, 1)),
     "N = 1 images are too few"),
    (lambda x: kernel_distance(torch.randn(1, 4), torch.randn(9, 4)), "N = 1 images"),
    (lambda x: precision_recall(torch.randn(3, 4), torch.randn(9, 4)),
     "N = 3 images are too few: give at least 4"),
    (lambda x: precision_recall(torch.randn(9, 4), torch.randn(9, 4), 0), "k must be"),
    (lambda x: kernel_distance(torch.randn(9, 4), torch.randn(9, 3)),
     "the same features of both, found 4 and 3"),
    (lambda x: frechet_distance(torch.randn(9, 4), torch.randn(9, 3)),
     "the same features of both, found 4 and 3"),
    (lambda x: statistics(torch.full((9, 2), math.nan)), "not finite"),
    (lambda x: statistics(torch.randn(9)), r"shape \(N, d\), found \(9,\)"),
    (lambda x: read_images(x * 2 - 1), r"values from 0 to 1, found -\d"),
    (lambda x: read_images(x * 255), r"values from 0 to 1, found \S+ to 2"),
    (lambda x: read_images(torch.full((2, 3, 8, 8), math.inf)), "not finite"),
    (lambda x: read_images(x[:0]), r"\(N, 3, H, W\), found \(0, 3, 16, 16\)"),
    (lambda x: read_images(x[0]), r"\(N, 3, H, W\), found \(3, 16, 16\)"),
    (lambda x: read_images([]), "images of one size, found none"),
    (lambda x: read_images([x[0], x[1, :, :8]]),
     r"one size, found \(3, 8, 16\) and \(3, 16, 16\)"),
    (lambda x: read_images(x, limit=0), "a limit of at least 1"),
    (lambda x: evaluate_images(x[:5], x, LOSS_NETWORK),
     "N = 5 images are too few for 64 features: give at least 65"),
    (lambda x: nearest_neighbors(x, x[..., :8]), "768 values, found 384"),
])
def test_bad_input_is_one_sentence(call, message, pictures):
    with pytest.raises(ValueError, match=message) as caught:
        call(pictures)
    assert "\n" not in str(caught.value)


def test_bad_files_are_one_sentence(tmp_path, pictures):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 8, 8, 3), np.float32))
    np.savez(tmp_path / "shape.npz", arr_0=np.zeros((2, 3, 8, 8), np.uint8))
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "name.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{"a": 1}], object))
    (tmp_path / "text.npz").write_text("no archive")
    for name, message in {
            "empty": "has no images", "floats.npz": "type float32",
            "shape.npz": r"shape \(2, 3, 8, 8\)", "none.npz": "is empty",
            "name.npz": "arr_0.npy", "pickle.npz": "type object",
            "text.npz": "not a zip file"}.items():
        with pytest.raises(ValueError, match=message):
            read_images(tmp_path / name)
    for name in ("nowhere", "nowhere.npz"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read_images(tmp_path / name)
    whole = pack(tmp_path / "whole.npz", pictures)
    with (zipfile.ZipFile(whole) as archive,
          zipfile.ZipFile(tmp_path / "short.npz", "w") as short):
        short.writestr("arr_0.npy", archive.read("arr_0.npy")[:-100])
    with pytest.raises(ValueError, match="ends before its last image"):
        list(read_images(tmp_path / "short.npz"))
    save(tmp_path / "bad", pictures[:1])
    (tmp_path / "bad" / "000.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_images(tmp_path / "bad")


# ---- the command line


@pytest.fixture(scope="module")
def saved_network(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("tiny")
    save_checkpoint(tiny.network, folder)
    return folder


def test_evaluate_of_folder_file_and_data_set(tmp_path, pictures, offline, minigen,
                                              saved_network):
    folder = save(tmp_path / "a", pictures[:30].flip(-2))
    file = pack(tmp_path / "a.npz", pictures[:30].flip(-2))
    reports = [json.loads(minigen("evaluate", source, "--extractor", saved_network,
                                  "--json")) for source in (folder, file)]
    assert reports[0].pop("images") == str(folder)
    assert reports[1].pop("images") == str(file)
    values, others = ([figure["value"] for figure in report["figures"].values()]
                      for report in reports)
    assert values == pytest.approx(others, abs=1e-7)
    figure = reports[0]["figures"]["precision"]
    assert {"N": 30, "M": 1000, "split": "val", "floor_N": 30,
            "hash": reports[0]["hash"]}.items() <= figure.items()
    assert {"floor", "spread", "value", "reference", "extractor"} <= set(figure)
    shown = minigen("evaluate", "landscapes:test", "--count", 40, "--size", 16,
                    "--reference", file, "--extractor", saved_network)
    assert re.search(r"40 images of landscapes:test against 30 of .*a.npz", shown)
    assert re.search(r"class accuracy +[\d.]+", shown)
    few = minigen("evaluate", folder, status=2)
    assert "N = 30 images are too few for 64 features: give at least 65" in few


def test_evaluate_draws_with_a_model(tmp_path, pictures, offline, minigen,
                                     monkeypatch, saved_network):
    """By the function `draw` of the script that trained it, with its options."""
    def draw(checkpoint, options):
        assert (checkpoint, options.seed) == (str(saved_network), 3)
        images = pictures[:options.count] * options.temperature
        return images, torch.arange(len(images)) % 9

    from minigen.runs import SampleOptions

    module = SimpleNamespace(draw=draw, SampleOptions=SampleOptions)
    monkeypatch.setattr(command_line, "script", lambda chapter: module)
    report = json.loads(minigen(
        "evaluate", saved_network, "--extractor", saved_network, "--count", 25,
        "--seed", 3, "--temperature", 0.5, "--json"))
    assert report["N"] == report["figures"]["class accuracy"]["N"] == 25
    assert report["figures"]["fine detail"]["value"] < 0.5
    assert report["seconds_per_image"] > 0
    few = minigen("evaluate", saved_network, "--extractor", saved_network,
                  "--count", 2, status=2)
    assert "images, found --count 2" in few, "said before anything is drawn"


def test_a_tokenizer_is_measured_against_other_images(tmp_path, offline, minigen,
                                                      saved_network):
    """Those of val it was given: against themselves the floor would be too high."""
    save_checkpoint(VQModel(VQConfig(channels=8, codebook_size=16)), tmp_path)
    write_json(tmp_path / "result.json", {"minutes": 1.5})
    report = json.loads(minigen("evaluate", tmp_path, "--extractor", saved_network,
                                "--count", 12, "--save", "--json"))
    kept = read_json(tmp_path / "result.json")
    assert kept["minutes"] == 1.5
    assert kept["evaluation"]["figures"] == report["figures"]
    assert kept["evaluation"]["hardware"]
    assert (report["reference"], report["N"]) == ("landscapes:test", 12)
    assert report["figures"]["class accuracy"]["floor_images"] == "landscapes:val"
    shown = minigen("evaluate", tmp_path, "--extractor", saved_network, "--count", 12,
                    "--reference", "landscapes:val")
    assert "seconds per image" in shown
    assert "split" not in shown


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere"], "nowhere is no folder of images, no .npz file and no data set's"),
    (["landscapes:all"], "no split 'all'"),
    ([MEASURING_NETWORK], "a model of features, which draws no images"),
    (["landscapes:test", "--guidance", "2"], "no option --guidance"),
    (["landscapes:test", "--reference", "nowhere"], "there is no nowhere"),
    (["landscapes:test", "--extractor", "nowhere"], "nowhere is no checkpoint"),
])
def test_mistakes_are_one_sentence(arguments, message, minigen, tmp_path, monkeypatch,
                                   offline):
    monkeypatch.chdir(tmp_path)
    error = minigen("evaluate", *arguments, status=2)
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_help(minigen, capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["evaluate", "--help"])
    assert "--reference" in capsys.readouterr().out
    assert "evaluate X" in minigen("--help")
    with pytest.raises(SystemExit, match="usage"):
        command_line.main(["evaluate"])


def test_of_very_many_images_some_make_the_pairs(tiny, pictures, monkeypatch):
    monkeypatch.setattr(metrics, "MOST", 20)
    figures = evaluate_images(pictures, pictures.flip(-1), tiny)["figures"]
    assert figures["FD-FeatureNetwork"]["N"] == 60
    assert figures["precision"]["N"] == figures["precision"]["M"] == 20


# ---- what ships


def evaluated() -> list[str]:
    """The shipped models whose result files have an evaluation, but for slow ones."""
    return sorted(file.stem for file in (runs.DATA / "results").glob("*.json")
                  if "evaluation" in read_json(file) and (SHIPPED / file.stem).is_dir()
                  and not file.stem.startswith("pixelgpt"))


@pytest.mark.parametrize("name", evaluated())
def test_shipped_figures_are_measured_again(name, offline, minigen):
    """With few images, on another machine: within the noise of so few."""
    kept = read_json(runs.DATA / "results" / f"{name}.json")["evaluation"]
    count = 72
    report = json.loads(minigen("evaluate", name, "--count", count, "--seed", 5,
                                *kept["options"], "--json"))
    for key in ("reference", "split", "extractor", "hash", "size"):
        assert report[key] == kept[key], key
    found, known = ({key: figure["value"] for key, figure in each["figures"].items()}
                    for each in (report, kept))
    right = known["class accuracy"]
    noise = 4 * (right * (1 - right) / count) ** 0.5 + 0.03
    assert found["class accuracy"] == pytest.approx(right, abs=noise)
    assert found["fine detail"] == pytest.approx(known["fine detail"], rel=0.4)
    assert found["diversity"] == pytest.approx(known["diversity"], rel=0.15)
    # unlike the Frechet distance, it does not depend on the number of images
    spread = kept["figures"]["KD-landscape"]["spread"]
    assert found["KD-landscape"] == pytest.approx(
        known["KD-landscape"], abs=8 * spread + 0.03)
    assert known["FD-landscape"] > kept["figures"]["FD-landscape"]["floor"]
