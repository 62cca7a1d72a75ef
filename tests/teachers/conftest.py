"""Asserts of the contract are explained like those of a test file."""

import pytest

pytest.register_assert_rewrite("teachers.basis", "teachers.contract", "teachers.explicit", "teachers.limits")
