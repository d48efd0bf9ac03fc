"""The secure sum: exact with and without drop-outs, uniform to a coalition, and what clients refuse."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats
from secure_round import DRAW, SecureRound

from fedmezo_jax.errors import UserError
from fedmezo_jax.privacy import secure_sum


@pytest.mark.parametrize(
    ("n", "threshold", "before", "after"),
    [(3, 2, (), ()), (8, 5, (), ()), (8, 5, (2, 7), ()), (8, 5, (0,), (1, 6)), (20, 11, (3, 4, 5), (0, 19))],
)
def test_the_sum_is_exact_whoever_drops_out(n, threshold, before, after):
    run = SecureRound(n, threshold, before_mask=before, after_mask=after)
    there = [i for i in range(n) if i not in before]
    np.testing.assert_array_equal(run.total(), run.vectors[there].sum(axis=0, dtype=np.uint64))


def test_too_few_at_the_end_give_no_sum():
    run = SecureRound(8, 5, before_mask=(0, 1), after_mask=(2,))
    run.staying = run.staying[:4]
    with pytest.raises(UserError, match="4 clients stayed to the end of the sum, and 5 are needed"):
        run.total()


def test_a_server_with_fewer_clients_than_the_threshold_sees_uniform_vectors():
    """With zeros for vectors, all that the coalition can take off is taken off; what is left is uniform bits."""
    bits = []
    for _ in range(60):
        run = SecureRound(5, 3, size=16)
        run.vectors[:] = 0
        coalition = (0, 1)
        left = run.masked[4] - run.vectors[4]
        for member in coalition:  # masks that two members have agreed with client 4
            seed = secure_sum._pair_seed(run.clients[member].masking, run.adverts[4].masking)
            stream = secure_sum._stream(seed, run.round, 16)
            left = left - stream if member > 4 else left + stream
        bits.append(np.unpackbits(left.view(np.uint8)))
    bits = np.array(bits)
    ones, count = int(bits.sum()), bits.size
    assert stats.binomtest(ones, count).pvalue > 1e-4
    flat = np.packbits(bits)
    assert stats.chisquare(np.bincount(flat, minlength=256)).pvalue > 1e-4


def test_fewer_shares_than_the_threshold_say_nothing_of_a_secret():
    """For any two shares of three there is a polynomial through them for every secret: their law is the same."""
    first, second = (
        np.array([secure_sum._split(secret, [0, 1, 2], 3, DRAW.bytes)[1] % 2**16 for _ in range(3000)])
        for secret in (0, 2**256 - 1)
    )
    assert stats.ks_2samp(first, second).pvalue > 1e-4
    assert stats.kstest(first / 2**16, "uniform").pvalue > 1e-4
    shares = secure_sum._split(12345, [0, 4, 9], 2, DRAW.bytes)
    for pair in ((0, 4), (4, 9), (0, 9)):
        assert int.from_bytes(secure_sum._join({id: shares[id] for id in pair}), "big") == 12345


def test_the_field_is_a_prime_one():
    """Miller and Rabin with random bases."""
    odd, twos = secure_sum.PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        x = pow(int.from_bytes(DRAW.bytes(32), "big"), odd, secure_sum.PRIME)
        seen = {x, *(x := x * x % secure_sum.PRIME for _ in range(twos))}
        assert x == 1 and (secure_sum.PRIME - 1 in seen or seen == {1})  # noqa: PT018


def test_a_second_unmask_is_refused():
    run = SecureRound(5, 3, before_mask=(4,))
    run.unmask(0)
    run.arrived = [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="has answered the step 'unmask'"):
        run.unmask(0)


@pytest.mark.parametrize(
    ("arrived", "named"),
    [([1, 2, 3], "lacks this one"), ([0, 1, 2, 9], "stranger"), ([0, 1, 1, 2], "one twice"), ([0, 1], "3 are needed")],
)
def test_a_list_that_cannot_be_is_refused(arrived, named):
    run = SecureRound(5, 3)
    run.arrived = arrived
    with pytest.raises(UserError, match=named):
        run.unmask(0)


def test_a_list_that_too_few_have_signed_is_refused():
    """A server that shows another list to some clients cannot have it signed by enough of them."""
    run = SecureRound(5, 3)
    run.arrived = [0, 1, 2, 3]
    with pytest.raises(UserError, match="fewer than 3 clients have signed"):
        run.unmask(0)


def test_keys_of_a_server_in_the_middle_are_refused():
    run = SecureRound(5, 3)
    fresh, _ = secure_sum.join(
        0, run.round, 3, run.clients[0].identities, Ed25519PrivateKey.from_private_bytes(DRAW.bytes(32))
    )
    forged = secure_sum.join(1, run.round, 3, run.clients[0].identities, fresh.identity)[1]
    with pytest.raises(UserError, match="the keys of client 1 are not signed by it"):
        secure_sum.share(fresh, run.adverts | {1: forged})
    fresh.answered.clear()
    other_round = SecureRound(5, 3, round=b"run 1, round 4")
    with pytest.raises(UserError, match="are not signed by it"):
        secure_sum.share(fresh, other_round.adverts)


def test_shares_for_another_client_are_refused():
    run = SecureRound(5, 3)
    boxes = run.boxes(0) | {3: run.sent[3][1]}
    with pytest.raises(UserError, match="the shares of client 3 were not made for client 0"):
        secure_sum.unmask(run.clients[0], boxes, run.arrived, run.signatures)


def test_a_threshold_of_half_is_refused():
    with pytest.raises(UserError, match="not more than half"):
        SecureRound(6, 3)
