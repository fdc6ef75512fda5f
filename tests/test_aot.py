"""What is read from what the assembler writes."""

from optx.bench.aot import Assembled

SASS = """
        /*0000*/   STL [R1], R4
.L_x_1:
        /*0010*/   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2]
        /*0020*/   @!P0 BRA `(.L_x_9)
.L_x_2:
        /*0030*/   LDL R5, [R1]
.L_x_3:
        /*0040*/   FADD R6, R6, R5
        /*0050*/   LDL.LU R7, [R1+0x4]
        /*0060*/   @P1 BRA `(.L_x_3)
        /*0070*/   STL [R1], R6
        /*0080*/   EXIT
.L_x_9:
        /*0090*/   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2]
        /*00a0*/   @P0 BRA `(.L_x_2)
        /*00b0*/   BRA `(.L_x_9)
"""


def assembled(sass: str) -> Assembled:
    return Assembled(kernel="k", registers=128, spill_bytes=16, stack_bytes=8, sass=sass)


def test_local_memory_inside_loops():
    """Of four accesses one is in a loop. A wait that stands at the end jumps back over all of them and is no loop around them."""
    assert assembled(SASS).looped == 1
    assert assembled(SASS.replace("@P1 BRA `(.L_x_3)", "@P1 BRA `(.L_x_1)")).looped == 2
    assert assembled(SASS.replace("@P1 BRA `(.L_x_3)", "NOP")).looped == 0
    assert assembled("").looped == 0


def test_matrix_instructions():
    text = "UTCHMMA gdesc[UR12], gdesc[UR10]\nUTCQMMA.2CTA gdesc[UR8]\nUTCQMMA.2CTA gdesc[UR6]\n"
    text += "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]\nHMMA.16816.F32.BF16 R4, R8\nFFMA R1, R2"
    assert assembled(text).matrix == "1 HGMMA, 1 HMMA, 1 UTCHMMA, 2 UTCQMMA.2CTA"
    assert assembled("").matrix == "-"
