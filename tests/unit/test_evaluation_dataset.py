"""Names of evaluations and of their parts: readable, and never the same for two."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from dpa_ds.evaluation.dataset import name_of_part

PARTS = st.tuples(
    st.none() | st.frozensets(st.integers(0, 300), min_size=1),
    st.none() | st.frozensets(st.text("ab_+-/. ", min_size=1), min_size=1),
    st.none() | st.integers(1, 30),
)


def test_a_part_is_named_after_what_it_covers() -> None:
    assert name_of_part(None, None, None) == "all"
    assert name_of_part([3, 0], None, 50) == "clients_0+3-first_50"
    assert name_of_part(None, ["verb", "animal"], None) == "tasks_animal+verb"
    assert name_of_part(None, ["a/b"], None).startswith("tasks_a_b-")


@given(st.sets(PARTS, min_size=2))
def test_two_parts_never_share_a_name(
    parts: set[tuple[frozenset[int] | None, frozenset[str] | None, int | None]],
) -> None:
    names = [
        name_of_part(clients and sorted(clients), tasks and sorted(tasks), limit) for clients, tasks, limit in parts
    ]
    assert all(one != other for one, other in itertools.combinations(names, 2))
    assert all("/" not in name and len(name) < 80 for name in names)
