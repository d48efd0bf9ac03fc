"""What is read off a compiled program's text: how much each communication yields, among whom and how often."""

import pytest

from fedmezo_jax.planning import collectives

HLO = """
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %s = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%cond (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %w = (s32[], f32[4,8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %g = bf16[16]{0} all-gather(%c), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}
  %h = (f32[2]{0}, f32[8]{0}) all-gather-start(%d), replica_groups=mesh['a'=2,'b'=2] {'a'}, dimensions={0}
  %j = f32[3]{0} all-reduce(%e), replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, to_apply=%add
  %k = (f32[2]{0}, s32[3]{0}) all-reduce(%e, %f), replica_groups={}, to_apply=%add
}
"""


def test_communications_are_read_off_a_program_s_text():
    assert collectives.collectives(HLO) == [
        collectives.Collective("all-reduce", 128, ((0, 1), (2, 3)), 5),
        collectives.Collective("all-gather", 32, ((0, 2), (1, 3)), 1),
        collectives.Collective("all-gather", 32, ((0, 2), (1, 3)), 1),
        collectives.Collective("all-reduce", 12, ((0, 1), (2, 3)), 1),
        collectives.Collective("all-reduce", 20, (), 1),
    ]


# As XLA writes them. Operands are smaller than, larger than or as large as the results.
ASYNCHRONOUS = {
    "all-gather": ("(f32[3]{0}, f32[12]{0}) all-gather-start(%a)", 48),
    "all-gather, combined": (
        "((f32[30,1]{0,1}, s8[5]{0}), (f32[30,4]{0,1}, s8[20]{0})) all-gather-start(%a, %b)",
        4 * 120 + 20,
    ),
    "all-reduce": ("f32[2,8]{1,0} all-reduce-start(%a)", 64),
    "all-reduce, combined": ("(f32[2]{0}, f32[8]{0}) all-reduce-start(%a, %b)", 4 * (2 + 8)),
    "all-reduce, many combined": (
        "(f32[2]{0}, f32[2]{0}, f32[2]{0}, f32[2]{0}, f32[2]{0}, /*index=5*/bf16[4]{0}) all-reduce-start(%a)",
        4 * 5 * 2 + 2 * 4,
    ),
    "collective-permute": ("(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a)", 32),
    "collective-permute, combined": (
        "((f32[8]{0}, f32[2]{0}), (f32[8]{0}, f32[2]{0}), u32[], u32[]) collective-permute-start(%a, %b)",
        4 * (8 + 2),
    ),
    "reduce-scatter": ("((f32[16]{0}), f32[4]{0}) reduce-scatter-start(%a)", 16),
    "all-to-all, layout in tiles": (
        "((bf16[8,2]{1,0:T(8,128)(2,1)}), bf16[8,2]{1,0:T(8,128)(2,1)S(1)}, u32[]) all-to-all-start(%a)",
        32,
    ),
}


@pytest.mark.parametrize(("name", "instruction", "size"), [(name, *case) for name, case in ASYNCHRONOUS.items()])
def test_an_asynchronous_communication_counts_all_of_its_results_and_no_operands(name, instruction, size):
    kind = name.partition(",")[0]
    done = f"%y = f32[2]{{0}} {kind}-done(%x)"
    text = f"ENTRY %main (a: f32[2]) -> f32[2] {{\n  %x = {instruction}\n  {done}\n}}\n"
    assert collectives.collectives(text) == [collectives.Collective(kind, size, (), 1)]


# Of a round of four clients on four A100s, as compiled by XLA of jaxlib 0.10.2: 30 losses and 30 coefficients of each.
COMPILED = """
ENTRY %main.1 (param.0: f32[]) -> f32[] {
  %all-gather-start = ((f32[30,1]{0,1}, f32[30,1]{0,1}), (f32[30,4]{0,1}, f32[30,4]{0,1})) \
all-gather-start(%bitcast.579.0, %bitcast.583.0), channel_id=1, \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true
  %all-gather-done = (f32[30,4]{0,1}, f32[30,4]{0,1}) all-gather-done(%all-gather-start)
}
"""


def test_clients_on_gpus_exchange_two_scalars_of_each_client_and_step():
    assert collectives.collectives(COMPILED) == [
        collectives.Collective("all-gather", 2 * 4 * 4 * 30, ((0, 1, 2, 3),), 1)
    ]
