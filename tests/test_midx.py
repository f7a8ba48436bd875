"""The inverted multi-index: cells, the proposal over them, and draws from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_cases import BATCH, IN, OUT, config_of, layer_tensors, one_each, select, selector_of, some_labels

import torch_slide as ts
from torch_slide import tables
from torch_slide.selection import make_selector, midx


def codes_of(selector):
    cells = selector.state["cells"].long()
    return cells // selector.num_codewords, cells % selector.num_codewords


def proposal_of_rows(selector, hidden):
    """By the definition: a softmax over all rows of each sample, averaged, and mixed with the uniform one."""
    queries = torch.cat([hidden, torch.ones(len(hidden), 1)], dim=1).double()
    first, second = codes_of(selector)
    middle = selector.middle
    scores = queries[:, :middle] @ selector.state["first"].double()[:, first]
    scores = scores + queries[:, middle:] @ selector.state["second"].double()[:, second]
    share = selector.uniform_share
    return (1 - share) * scores.softmax(1).mean(0) + share / selector.out_features


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 17, 200, 1500]),
    width=st.sampled_from([1, 2, 7, 16]),
    batch=st.sampled_from([1, 3, 33]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_proposal_is_the_softmax_over_codewords(rows, width, batch, scale, share, with_bias, seed):
    weight, bias, _ = layer_tensors(rows, width, seed)
    selector = selector_of("midx", weight, bias if with_bias else None, uniform_fraction=share)
    hidden = scale * torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))
    chances = selector.chances(hidden)
    expected = proposal_of_rows(selector, hidden)
    found = chances[selector.state["cells"].long()].double()
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-12)
    assert (chances >= selector.uniform_share / rows * 0.999).all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_codewords_lie_near_the_rows(with_bias):
    """Halves that are a few directions and some noise are told apart, the bias included."""
    torch.manual_seed(0)
    rows = 4096
    selector = make_selector(8, rows, config_of("midx"))
    assert selector.num_codewords == 16
    kinds = torch.randint(0, 16, (rows, 2))
    halves = [torch.randn(16, 4), torch.randn(16, 5)]
    vectors = torch.cat([halves[0][kinds[:, 0]], halves[1][kinds[:, 1]]], 1) + 0.01 * torch.randn(rows, 9)
    weight, bias = vectors[:, :8].contiguous(), vectors[:, 8].contiguous()
    if not with_bias:
        bias, vectors[:, 8] = None, 0.0
    selector.rehash(weight, bias)
    first, second = codes_of(selector)
    for half, name, code in ((vectors[:, :4], "first", first), (vectors[:, 4:], "second", second)):
        codewords = selector.state[name].T
        distances = torch.cdist(half, codewords)
        assert (distances.gather(1, code[:, None])[:, 0] - distances.amin(1)).abs().max() < 1e-3, "the nearest one"
        # Far below what one codeword would leave, as some directions may share theirs.
        rest = (half - codewords[code]).square().sum()
        assert rest < 0.2 * (half - half.mean(0)).square().sum()


def test_rows_lie_in_their_cells():
    weight, bias, _ = layer_tensors()
    selector = selector_of("midx", weight, bias)
    state = selector.state
    assert sorted(state["by_cell"].tolist()) == list(range(OUT))
    owners = torch.arange(len(state["sizes"])).repeat_interleave(state["sizes"])
    assert torch.equal(state["cells"][state["by_cell"].long()].long(), owners)


def test_draws_hit_every_row_as_often_as_the_proposal_says():
    """In proportion to it, of rows that are no labels; what the op is told is how often they came."""
    weight, bias, hidden = layer_tensors()
    selector = selector_of("midx", weight, bias, num_active=30)
    expected = proposal_of_rows(selector, hidden)
    labels, draws = some_labels(), 1000
    seen = torch.zeros(OUT, dtype=torch.float64)
    for draw in range(draws):
        tail = selector._sources(hidden, weight, bias, labels, one_each(labels), torch.tensor(draw)).tail
        assert len(tail.rows.unique()) == len(tail.rows)
        seen[tail.rows] += 1
    inclusion = tail.inclusion[tail.classes.long()].double()
    assert ((seen - draws * inclusion).abs() <= 5 * (draws * inclusion * (1 - inclusion)).sqrt()).all()
    others = torch.ones(OUT, dtype=torch.bool)
    others[labels] = False
    assert float(inclusion[others].sum()) == pytest.approx(30, rel=1e-4), "num_active beyond the labels"
    uncertain = inclusion < 1
    scale = inclusion[uncertain] / expected[uncertain]
    torch.testing.assert_close(scale, scale[:1].expand(len(scale)), rtol=1e-3, atol=0)


def test_it_finds_the_rows_that_matter():
    """Of the rows that cover most of the softmax it draws many times as many as a uniform tail does."""
    torch.manual_seed(0)
    centres = torch.randn(40, 16)
    weight = (centres[torch.randint(0, 40, (4000,))] + 0.3 * torch.randn(4000, 16)).contiguous()
    hidden = 1.5 * centres[torch.randint(0, 5, (BATCH,))]
    mass = (hidden @ weight.T).softmax(1).sum(0)
    best = set(mass.topk(200).indices.tolist())
    found = {}
    for name in ("midx", "uniform"):
        selector = selector_of(name, weight, torch.zeros(4000), num_active=400, uniform_fraction=0.1)
        found[name] = len(best & set(select(selector, weight, None, hidden, some_labels(4000)).ids.tolist()))
    assert found["midx"] > 4 * found["uniform"]


def test_a_rehash_codes_the_rows_that_changed(monkeypatch):
    torch.manual_seed(0)
    lsh = config_of("midx", rehash=ts.RehashSchedule(every=100, redraw_every=3))
    head = ts.SparseLSHLinear(IN, OUT, lsh=lsh, sparse_grad=True)
    optimizer = ts.optim.RowSGD(head.parameters(), lr=1.0)
    asked = []
    checked = tables.checked_norms
    monkeypatch.setattr(midx, "checked_norms", lambda w, b, rows: asked.append(rows) or checked(w, b, rows))
    books = []
    for step in range(5):
        head.loss(torch.randn(BATCH, IN), some_labels(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        head.rehash()
        books.append(head.selector.state["first"].clone())
        cells = head.selector._cells_of(torch.cat([head.weight, head.bias[:, None]], 1).detach())
        assert torch.equal(cells, head.selector.state["cells"]), "as if all had been coded"
    # The loss itself rehashed first, so the step is one ahead; trained anew at every third rehash.
    assert asked[0] is asked[3] is None
    assert all(0 < len(rows) < OUT for rows in (asked[1], asked[2], asked[4], asked[5]))
    assert torch.equal(books[0], books[1])
    assert not torch.equal(books[1], books[2])
    assert torch.equal(books[2], books[4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_queries_without_a_softmax_get_uniform_draws(bad):
    weight, bias, hidden = layer_tensors()
    selector = selector_of("midx", weight, bias)
    hidden[3] = bad
    found = selector.chances(hidden)
    assert float(found[selector.state["cells"].long()].sum()) == pytest.approx(1, rel=1e-4)
    if bad != 1e30:  # a score that is far above all others is no reason
        assert torch.equal(found, torch.full_like(found, 1 / OUT))
    assert torch.equal(selector.chances(hidden[:0]), torch.full_like(found, 1 / OUT))
    assert torch.isfinite(select(selector, weight, bias, hidden, some_labels()).log_weights).all()


def test_empty_cells_take_nothing_from_the_others():
    """The likely cell of every sample may be one without rows."""
    selector = make_selector(1, 64, config_of("midx", uniform_fraction=0.0))
    assert selector.num_codewords == 2
    selector.state["first"][0] = torch.tensor([0.0, 200.0])
    selector.state["second"][0] = torch.tensor([0.0, 200.0])
    cells = torch.zeros(64, dtype=torch.int32)
    cells[5], cells[9] = 1, 2  # none in the cell of both large codewords, 3
    selector.state["cells"].copy_(cells)
    selector.restore()
    uniform = torch.full((4,), selector.uniform_share / 64)
    torch.testing.assert_close(selector.chances(torch.ones(BATCH, 1)), uniform)
    # The likely cell of the other half of the batch holds one row, which has their half of the draws.
    halves = torch.cat([torch.ones(BATCH, 1), -torch.ones(BATCH, 1)])
    theirs = torch.tensor([0, (1 - selector.uniform_share) / 2, 0, 0])
    torch.testing.assert_close(selector.chances(halves), uniform + theirs)
    rows = selector._sources(
        torch.ones(BATCH, 1), torch.ones(64, 1), None, some_labels(64), one_each(some_labels()), torch.tensor(0)
    ).tail.rows
    assert len(rows) > 0
    assert ((rows >= 0) & (rows < 64)).all()


@pytest.mark.parametrize("cell", [-1, 16])
def test_a_wrong_state_is_named(cell):
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of("midx"))
    state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    state["lsh.cells"][7] = cell
    with pytest.raises(RuntimeError, match=r"lsh.cells: expected numbers in \[0, 16\), got "):
        head.load_state_dict(state)
