"""Functions that several tests share are in modules beside this one."""

import pytest

# Their asserts tell what they compared, as those of the tests do.
pytest.register_assert_rewrite(f"{__package__}.problems", f"{__package__}.toy_attention")
