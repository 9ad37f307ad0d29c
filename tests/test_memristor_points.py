"""Geometry and network of point clouds: properties, brute force, bad input."""
import math

import pytest
import torch
from torch import nn

from hkust_demos.memristor.pointnet import (
    LEVELS, Level, PointNet2Lite, SetAbstraction, ball_query, farthest_point_sample, neighborhoods, unpack_neighborhoods)
from hkust_demos.memristor.ternary import build_seeded, count_macs, load_network, recalibrate_bn, save_network


def ball(n_clouds=3, n_points=128, seed=0, dtype=torch.float32):
    "Clouds of distinct points inside the unit ball."
    points = torch.randn(n_clouds, n_points, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return points / points.norm(dim=-1).amax(1)[:, None, None]


def plain_sample(cloud, m, first):
    "Farthest points of one cloud by the definition, all distances anew in each step."
    picks = [first]
    while len(picks) < m:
        gaps = [-1.0 if j in picks else min((cloud[j] - cloud[i]).square().sum().item() for i in picks) for j in range(len(cloud))]
        picks.append(gaps.index(max(gaps)))
    return picks


def plain_query(radius, k, cloud, center, order):
    "One ball by the definition."
    distances = [(point - center).square().sum().item() for point in cloud]
    inside = [j for j, d in enumerate(distances) if d <= radius**2]
    if order == "nearest":
        inside.sort(key=lambda j: distances[j])
    inside = inside or [distances.index(min(distances))]
    return (inside + [inside[0]] * k)[:k] if len(inside) < k else inside[:k]


def rotation(seed):
    "A random rotation in three dimensions, double."
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return turn * turn.det().sign()


@pytest.mark.parametrize("m", [1, 2, 17, 40])
def test_sample_by_definition(m):
    clouds = ball(2, 40, dtype=torch.float64)
    first = (clouds - clouds.mean(1, keepdim=True)).square().sum(-1).argmax(1)
    found = farthest_point_sample(clouds, m)
    assert found.tolist() == [plain_sample(cloud, m, int(i)) for cloud, i in zip(clouds, first)]


def test_sample_with_start():
    clouds = ball(3, 30, dtype=torch.float64)
    start = torch.tensor([4, 0, 29])
    found = farthest_point_sample(clouds, 12, start=start)
    assert found.tolist() == [plain_sample(cloud, 12, int(i)) for cloud, i in zip(clouds, start)]
    assert torch.equal(found[1:2], farthest_point_sample(clouds[1:2], 12, start=start[1:2]))  # no cloud sees another


def test_sample_all_points_is_a_permutation():
    assert torch.equal(farthest_point_sample(ball(), 128).sort(1).values, torch.arange(128).expand(3, -1))


def test_sample_indices_differ_even_if_points_do_not():
    repeated = torch.cat([ball(2, 5), ball(2, 5), ball(2, 5)], 1)
    for clouds, distinct in ((repeated, 5), (torch.ones(2, 9, 3), 1)):
        found = farthest_point_sample(clouds, 9)
        assert all(len(set(row.tolist())) == 9 for row in found)
        first = clouds.gather(1, found[:, :distinct, None].expand(-1, -1, 3))
        assert all(len(cloud.unique(dim=0)) == distinct for cloud in first)  # every place once before any twice


def test_sample_gaps_never_grow():
    clouds = ball(dtype=torch.float64)
    picks = clouds.gather(1, farthest_point_sample(clouds, 64)[..., None].expand(-1, -1, 3))
    gaps = torch.stack([torch.cdist(picks[:, :t], picks[:, t:t + 1]).amin(1).flatten() for t in range(1, 64)])
    assert (gaps.diff(dim=0) <= 1e-12).all()


def test_sample_follows_the_points():
    clouds, order = ball(dtype=torch.float64), torch.randperm(128, generator=torch.Generator().manual_seed(1))
    found = farthest_point_sample(clouds[:, order], 32)
    assert torch.equal(order[found], farthest_point_sample(clouds, 32))


def test_nothing_touches_the_input_or_the_global_generator():
    clouds, state = ball().requires_grad_(), torch.get_rng_state()
    before = clouds.detach().clone()
    picks = farthest_point_sample(clouds, 8)
    groups = ball_query(0.3, 4, clouds, clouds[:, :8])
    assert torch.equal(before, clouds) and torch.equal(state, torch.get_rng_state())
    assert not picks.requires_grad and not groups.requires_grad


@pytest.mark.parametrize("order", ["nearest", "index"])
@pytest.mark.parametrize("radius,k", [(0.05, 4), (0.4, 1), (0.4, 8), (0.7, 50), (3.0, 30), (3.0, 45)])
def test_query_by_definition(order, radius, k):
    clouds = ball(2, 40, dtype=torch.float64)
    centers = torch.cat([clouds[:, :6], ball(2, 3, seed=5, dtype=torch.float64)], 1)
    found = ball_query(radius, k, clouds, centers, order=order)
    assert found.tolist() == [[plain_query(radius, k, cloud, center, order) for center in row] for cloud, row in zip(clouds, centers)]


def test_query_agrees_with_cdist():
    clouds = ball(4, 200, dtype=torch.float64)
    centers = clouds[:, :50]
    distances, index = torch.cdist(centers, clouds, compute_mode="donot_use_mm_for_euclid_dist").topk(8, largest=False)
    assert torch.equal(ball_query(0.3, 8, clouds, centers), torch.where(distances <= 0.3, index, index[..., :1]))


@pytest.mark.parametrize("order", ["nearest", "index"])
def test_query_holds_the_center_and_stays_in_the_ball(order):
    clouds = ball()
    picks = farthest_point_sample(clouds, 32)
    centers = clouds.gather(1, picks[..., None].expand(-1, -1, 3))
    groups = ball_query(0.4, 128, clouds, centers, order=order)
    assert (groups == picks[..., None]).any(-1).all()
    members = clouds.gather(1, groups.flatten(1)[..., None].expand(-1, -1, 3)).unflatten(1, (32, 128))
    assert (members - centers[:, :, None]).norm(dim=-1).max() <= 0.4


def test_tiny_clouds_far_from_the_origin():
    "The expanded formula for distances fails here."
    clouds = 1e-3 * ball(2, 64) + 1000
    clouds = (clouds * 2**13).round() / 2**13  # what float32 holds at 1000
    groups = ball_query(1e-6, 4, clouds, clouds)
    assert torch.equal(clouds.gather(1, groups[..., 0, None].expand(-1, -1, 3)), clouds)


def test_empty_ball_gives_the_nearest():
    clouds, far = ball(1, 20), torch.full((1, 1, 3), 50.0)
    nearest = torch.cdist(far, clouds).argmin().item()
    for order in ("nearest", "index"):
        assert ball_query(0.1, 3, clouds, far, order=order).flatten().tolist() == [nearest] * 3


def test_duplicates_of_one_point():
    clouds = torch.full((2, 70, 3), 0.25)
    assert (ball_query(0.1, 8, clouds, clouds[:, :3]) >= 0).all()
    logits, semantic = build_seeded(PointNet2Lite, seed=0).eval()(clouds)
    assert torch.isfinite(logits).all() and all(torch.isfinite(vector).all() for vector in semantic)
    for vector in semantic:  # all points alike: mean and maximum agree
        mean, top = vector.chunk(2, 1)
        torch.testing.assert_close(mean, top, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_indices_do_not_turn_with_the_cloud(seed):
    clouds = ball(8, 256, seed, torch.float64)
    assert torch.equal(neighborhoods(clouds), neighborhoods(clouds @ rotation(seed)))
    assert torch.equal(neighborhoods(clouds), neighborhoods(clouds + 0.25))


def test_levels_agree_with_plain_queries():
    clouds = ball(5, 256, dtype=torch.float64)
    picks, groups = unpack_neighborhoods(neighborhoods(clouds, batch=2))
    assert torch.equal(picks, farthest_point_sample(clouds, 64))
    centers = clouds.gather(1, picks[..., None].expand(-1, -1, 3))
    sources = [clouds, *(centers[:, :level.n_points] for level in LEVELS)]
    for level, source, found in zip(LEVELS, sources, groups):
        assert torch.equal(found, ball_query(level.radius, level.n_neighbors, source, centers[:, :level.n_points]))
        again = farthest_point_sample(source, level.n_points, start=picks[:, 0] if source is clouds else torch.zeros(5, dtype=torch.long))
        assert torch.equal(again, picks if source is clouds else torch.arange(level.n_points).expand(5, -1))  # samples are nested


def test_levels_of_unequal_group_sizes():
    levels = (Level(20, 0.5, 3, (4,)), Level(20, 0.6, 9, (5, 6)), Level(8, 0.7, 2, (7,)), Level(2, 2.0, 4, (3,)))
    clouds = ball(2, 30, dtype=torch.float64)
    picks, groups = unpack_neighborhoods(neighborhoods(clouds, levels=levels), levels=levels)
    centers = clouds.gather(1, picks[..., None].expand(-1, -1, 3))
    for level, source, found in zip(levels, [clouds, *(centers[:, :level.n_points] for level in levels)], groups):
        assert torch.equal(found, ball_query(level.radius, level.n_neighbors, source, centers[:, :level.n_points]))
    logits, semantic = PointNet2Lite(4, levels=levels).double().eval()(clouds)
    assert logits.shape == (2, 4) and [vector.shape[1] for vector in semantic] == [8, 12, 14, 6]


def test_network_ignores_the_order_of_points():
    network = build_seeded(PointNet2Lite, seed=0).double().eval()
    clouds, order = ball(4, 256, dtype=torch.float64), torch.randperm(256, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        (logits, semantic), (shuffled, others) = network(clouds), network(clouds[:, order])
    torch.testing.assert_close(logits, shuffled, atol=1e-9, rtol=0)
    for one, other in zip(semantic, others):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_network_in_batches_and_alone():
    network, clouds = build_seeded(PointNet2Lite, seed=0).eval(), ball(6, 256)
    with torch.no_grad():
        together, alone = network(clouds)[0], torch.cat([network(cloud[None])[0] for cloud in clouds])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_every_weight_is_used():
    network, clouds = build_seeded(PointNet2Lite, seed=0), ball(6, 256)
    network(clouds)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_macs_and_ternary_values():
    network = build_seeded(PointNet2Lite, seed=0).eval()
    blocks, head = count_macs(network, ball(2, 256))
    assert blocks == [155648, 286720, 313344, 548864, 608256, 1073152] and head == 4736
    assert sum(blocks) + head == 2990720
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 14 and all(set(layer.ternary().sign.unique().tolist()) <= {-1, 0, 1} for layer in layers)
    assert all(len(layer.effective_weight().unique()) <= 3 for layer in layers)
    assert all(len(layer.effective_weight().unique()) > 3 for layer in PointNet2Lite(quantize=False).modules() if isinstance(layer, nn.Linear))


def test_round_trip_and_recalibration(tmp_path):
    network, clouds = build_seeded(lambda: PointNet2Lite(4), seed=0), ball(16, 256)
    recalibrate_bn(network, (clouds, neighborhoods(clouds)), batch=8)
    save_network(tmp_path, network, {"command": "none", "data": "none", "seed": 0, "metrics": {}})
    loaded = load_network(tmp_path, PointNet2Lite)
    with torch.no_grad():
        torch.testing.assert_close(loaded(clouds)[0], network(clouds)[0])
    assert loaded.levels == LEVELS


@pytest.mark.parametrize("bad,message", [
    (torch.zeros(3), "shape"), (torch.zeros(2, 5, 2), "shape"), (torch.zeros(2, 5, 3, dtype=torch.long), "int64"), ([[0, 0, 0]], "list"),
    (torch.full((1, 5, 3), math.nan), "NaN"), (torch.full((1, 5, 3), math.inf), "infinite")])
def test_bad_clouds(bad, message):
    for call in (lambda: farthest_point_sample(bad, 2), lambda: ball_query(1, 2, bad, torch.zeros(1, 1, 3)), lambda: neighborhoods(bad)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("call,message", [
    (lambda c: farthest_point_sample(c, 0), "m is 0"),
    (lambda c: farthest_point_sample(c, 129), "m is 129"),
    (lambda c: farthest_point_sample(c, 4, start=torch.tensor([0, 1])), "start"),
    (lambda c: farthest_point_sample(c, 4, start=torch.tensor([0, 1, 128])), "start"),
    (lambda c: farthest_point_sample(c, 4, start=torch.tensor([0, 1, -1])), "start"),
    (lambda c: farthest_point_sample(c, 4, start=torch.zeros(3)), "start"),
    (lambda c: ball_query(0, 4, c, c), "radius is 0"),
    (lambda c: ball_query(math.nan, 4, c, c), "radius is nan"),
    (lambda c: ball_query(1, 0, c, c), "k is 0"),
    (lambda c: ball_query(1, 4, c, c, order="random"), "order is 'random'"),
    (lambda c: ball_query(1, 4, c, c[:1]), "as many clouds"),
    (lambda c: ball_query(1, 4, c[:, :0], c), "at least one point"),
    (lambda c: neighborhoods(c[:, :63]), "at least 64"),
    (lambda c: neighborhoods(c[:0]), "at least one cloud"),
    (lambda c: PointNet2Lite()(c[:, :63]), "at least 64"),
    (lambda c: PointNet2Lite()(c, torch.zeros(3, 7, dtype=torch.long)), "1856"),
    (lambda c: PointNet2Lite(levels=()), "at least one level"),
    (lambda c: SetAbstraction(0.0, 3, widths=(4,)), "radius is 0.0")])
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(ball())
