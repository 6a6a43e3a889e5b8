import pytest

from metalm.analysis.figures.figure_parts import round_numbers


@pytest.mark.parametrize(
    ("low", "high"), [(35, 90), (100, 2.9e8), (1100, 3000), (42, 43), (7, 7), (0.02, 5), (3, 1e300)]
)
def test_round_numbers_are_few_round_and_about_the_range(low, high):
    numbers = round_numbers(low, high)
    assert 4 <= len(numbers) <= 10
    assert numbers == sorted(set(numbers))
    for number in numbers:
        assert low / 1.3 <= number <= high * 1.3
        assert float(f"{number:.1e}") == pytest.approx(number)
