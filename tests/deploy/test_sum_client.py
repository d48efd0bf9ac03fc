"""What a client answers in a secure sum, and what it refuses to a server that asks for more than the sum."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sum_parties import CONFIG, RUN, Parties

from fedmezo_jax.deploy.agreement import sum_name
from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import fixed_point, secure_sum

FIRST, SECOND = b"the first sum...", b"the second sum.."
ALL, FOUR = [0, 1, 2, 3, 4], [0, 1, 2, 3]


def total(parties, masked, signed, unmasked, at=(0, 0)):
    name = sum_name(RUN, parties.name, *at)
    return secure_sum.total(name, 4, parties.adverts, ALL, {i: masked[i] for i in signed}, unmasked)


def finish(parties, masked, ids, at=(0, 0)):
    """The rest of a sum of these clients, all of whom stay."""
    signed = {i: parties.agree(i, ids) for i in ids}
    return total(parties, masked, signed, {i: parties.unmask(i, signed) for i in ids}, at)


@pytest.mark.parametrize("ids", [ALL, FOUR])
def test_the_sum_is_that_of_the_numbers(ids):
    parties = Parties()
    summed = finish(parties, parties.masked(FIRST), ids)
    np.testing.assert_array_equal(fixed_point.decode(summed) * 2.0**fixed_point.SCALE, parties.clear_sum(ids))


def test_the_same_numbers_are_masked_otherwise_each_time():
    """Keys and masks are of no seed; the sum is the same."""
    parties, others = Parties(), Parties()
    masked, other = parties.masked(FIRST), others.masked(FIRST)
    assert not any(np.any(masked[i] == other[i]) for i in ALL)
    np.testing.assert_array_equal(finish(parties, masked, ALL), finish(others, other, ALL))


@pytest.mark.parametrize(
    ("arrived", "line"),
    [
        ([0, 1, 2], "the list has 3 clients, and 4 are needed"),
        ([1, 2, 3, 4], "lacks this one"),
        ([0, 1, 1, 2, 3], "one twice"),
        ([0, 1, 2, 9], "whose shares have not come in"),
    ],
)
def test_a_list_that_cannot_be_is_not_signed(arrived, line):
    parties = Parties()
    parties.masked(FIRST)
    with pytest.raises(UserError, match=line):
        parties.agree(0, arrived)


def test_a_server_that_shows_each_client_another_list_learns_nothing():
    """With client 4 on some lists and missing on others it would get both shares of its secrets."""
    parties = Parties()
    parties.masked(FIRST)
    signed = {0: parties.agree(0, FOUR), 1: parties.agree(1, FOUR), 2: parties.agree(2, ALL), 3: parties.agree(3, ALL)}
    for i in FOUR:
        with pytest.raises(UserError, match="fewer than 4 clients have signed the list of those that are summed"):
            parties.unmask(i, signed)


def test_a_second_unmask_is_refused():
    parties = Parties()
    parties.masked(FIRST)
    signed = {i: parties.agree(i, ALL) for i in ALL}
    parties.unmask(0, signed)
    with pytest.raises(UserError, match="client 0 has answered the step 'unmask' of this round"):
        parties.unmask(0, signed)


@pytest.mark.parametrize("at", [(0, 0), (0, 1)], ids=["the same attempt", "another attempt"])
def test_another_list_in_the_same_round_is_refused(at):
    """The difference of the two sums would be the numbers of client 4."""
    parties = Parties()
    finish(parties, parties.masked(FIRST), ALL)
    parties.masked(SECOND, at)
    with pytest.raises(UserError, match=r"round 1: client 0 has helped to sum the numbers of clients 0, 1, 2, 3, 4,"):
        parties.agree(0, FOUR)


def test_two_sums_at_once_give_no_two_lists_either():
    parties = Parties()
    parties.masked(FIRST)
    first = {i: parties.agree(i, ALL) for i in ALL}
    parties.masked(SECOND)
    second = {i: parties.agree(i, FOUR) for i in FOUR}
    parties.unmask(0, second)
    parties.name = FIRST
    with pytest.raises(UserError, match="and helps with no other list in this round"):
        parties.unmask(0, first)


def test_the_same_list_may_be_summed_again_and_another_in_the_next_round():
    """A server that was stopped asks once more."""
    parties = Parties()
    one = finish(parties, parties.masked(FIRST), FOUR)
    np.testing.assert_array_equal(finish(parties, parties.masked(SECOND, (0, 1)), FOUR, (0, 1)), one)
    np.testing.assert_array_equal(
        fixed_point.decode(finish(parties, parties.masked(FIRST, (1, 0)), ALL, (1, 0))) * 2.0**fixed_point.SCALE,
        parties.clear_sum(ALL),
    )


def test_keys_of_a_server_in_the_middle_are_refused():
    parties = Parties()
    parties.begin(FIRST)
    identities, stranger = dict(enumerate(parties.public)), Ed25519PrivateKey.generate()
    parties.adverts[3] = secure_sum.join(3, sum_name(RUN, FIRST, 0, 0), 4, identities, stranger)[1]
    with pytest.raises(UserError, match="the keys of client 3 are not signed by it"):
        parties.share()


def test_keys_of_another_sum_are_refused():
    parties = Parties()
    parties.begin(FIRST)
    old = parties.adverts[3]
    parties.begin(SECOND)
    parties.adverts[3] = old
    with pytest.raises(UserError, match="the keys of client 3 are not signed by it"):
        parties.share()


@pytest.mark.parametrize("which", ["encryption", "masking"])
def test_keys_with_which_everyone_agrees_on_zero_are_refused(which):
    parties = Parties()
    parties.begin(FIRST)
    parties.adverts[3] = self_signed(parties, 3, **{which: bytes(32)})
    with pytest.raises(UserError, match="is a point of low order"):
        secure_sum.check_keys(parties.adverts[3])
    if which == "masking":  # which is not used before
        parties.share()
    with pytest.raises(UserError, match="is a point of low order"):
        parties.share() if which == "encryption" else parties.mask(0)


def self_signed(parties, i, **changed):
    """A client's other keys, signed by itself."""
    keys = parties.adverts[i]._replace(**changed)[:2]
    statement = secure_sum._statement(b"keys", sum_name(RUN, parties.name, 0, 0), *keys)
    return secure_sum.Advert(*keys, parties.sums[i]._key.sign(statement))


def test_shares_that_were_made_for_others_are_named():
    """Nothing is masked then, and may still be without those that sent them."""
    parties = Parties()
    parties.begin(FIRST)
    parties.share()
    parties.boxes[0][3], parties.boxes[0][4] = parties.boxes[1][3], bytes(94)
    assert parties.mask(0) == [3, 4]
    parties.boxes[0] = {i: parties.boxes[0][i] for i in (0, 1, 2)}
    with pytest.raises(UserError, match="the list has 3 clients, and 4 are needed"):
        parties.mask(0)


@pytest.mark.parametrize("step", ["share", "mask", "agree", "unmask"])
def test_a_restarted_client_has_no_secrets(step):
    parties = Parties()
    parties.masked(FIRST)
    with pytest.raises(UserError, match="the secrets of this sum are gone"):
        Parties().sums[0].answer(FIRST, step, b"")


def test_a_client_takes_part_in_the_attempts_that_the_seed_draws_it_for():
    config = type(CONFIG)(**vars(CONFIG) | {"participation": 0.6})
    parties, drawn = Parties(config), []
    for attempt in range(5):
        for i, sums in enumerate(parties.sums):
            try:
                sums.begin(bytes([attempt]) * 16, RUN, 0, attempt, parties.numbers[i])
                drawn.append((attempt, i))
            except UserError as error:
                assert f"client {i} takes no part in attempt {attempt + 1}" in str(error)  # noqa: PT017
    assert [sum(at == attempt for at, _ in drawn) for attempt in range(5)] == [3, 3, 3, 0, 0]
