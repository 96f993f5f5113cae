import pytest

pytest.register_assert_rewrite("tests.qemu.labs.lab")
