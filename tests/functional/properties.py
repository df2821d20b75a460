"""Settings and strategies of the property tests."""

from hypothesis import settings
from hypothesis import strategies as st

few_examples = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 3)
seeds = st.integers(0, 2**31 - 1)
