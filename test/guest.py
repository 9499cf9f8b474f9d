"""A whole guest in one disk sector, told over its serial port how to end.

The firmware loads the sector at 0x7C00 and runs it. The guest says READY, then
obeys commands of one letter each. Every command writes one word to one I/O
port of the `pc` machine, and is answered with its own letter if the guest is
still there to answer. Between commands the processor halts, so that many
guests share a small host.
"""

READY = b"!"

POWER_OFF = b"p"
HIBERNATE = b"h"
REBOOT = b"r"
PANIC = b"c"
OBEY_POWER_BUTTON = b"b"

# Power management of the PIIX4 chip, as the firmware places it.
_PM1_ENABLE = 0x602
_PM1_CONTROL = 0x604
_POWER_BUTTON = 1 << 8
_SLEEP = 1 << 13
_S5 = 0 << 10
_S4 = 2 << 10

_RESET_CONTROL = 0xCF9
_FULL_RESET = 0x06

_PVPANIC = 0x505
_PANICKED = 0x01

# Each command's port, and the word written there.
_COMMANDS = {
    POWER_OFF: (_PM1_CONTROL, _SLEEP | _S5),
    HIBERNATE: (_PM1_CONTROL, _SLEEP | _S4),
    REBOOT: (_RESET_CONTROL, _FULL_RESET),
    PANIC: (_PVPANIC, _PANICKED),
    # The chip reports the power button only where it is enabled: until this
    # command, and again after a reset, the guest ignores it.
    OBEY_POWER_BUTTON: (_PM1_ENABLE, _POWER_BUTTON),
}

# The bytes; the offset of the first one; what they say to the processor.
_CODE = bytes.fromhex(
    "31 C0"  #    00          xor ax, ax
    "8E D8"  #    02          mov ds, ax
    "FC"  #       04          cld
    "B0 34"  #    05          mov al, 0x34      timer 0 interrupts
    "E6 43"  #    07          out 0x43, al      every 0x1300 / 1193182 s,
    "B0 00"  #    09          mov al, 0x00      so no hlt lasts longer than 4 ms
    "E6 40"  #    0B          out 0x40, al
    "B0 13"  #    0D          mov al, 0x13
    "E6 40"  #    0F          out 0x40, al
    "FB"  #       11          sti
    "B3 21"  #    12          mov bl, '!'       READY
    "88 D8"  #    14 answer:  mov al, bl
    "BA F8 03"  # 16          mov dx, 0x3F8     serial port, data
    "EE"  #       19          out dx, al
    "F4"  #       1A wait:    hlt
    "BA 00 06"  # 1B          mov dx, 0x600     PM1 status
    "ED"  #       1E          in ax, dx
    "F6 C4 01"  # 1F          test ah, 1        power button pressed?
    "B3 70"  #    22          mov bl, 'p'       POWER_OFF
    "75 0E"  #    24          jnz obey
    "BA FD 03"  # 26          mov dx, 0x3FD     serial port, line status
    "EC"  #       29          in al, dx
    "A8 01"  #    2A          test al, 1        a letter has come?
    "74 EC"  #    2C          jz wait
    "BA F8 03"  # 2E          mov dx, 0x3F8
    "EC"  #       31          in al, dx
    "88 C3"  #    32          mov bl, al
    "BE 49 7C"  # 34 obey:    mov si, table
    "AC"  #       37 next:    lodsb             a command's letter, 0 at the end
    "84 C0"  #    38          test al, al
    "74 DE"  #    3A          jz wait
    "88 C7"  #    3C          mov bh, al
    "AD"  #       3E          lodsw             its port
    "89 C2"  #    3F          mov dx, ax
    "AD"  #       41          lodsw             its word
    "38 DF"  #    42          cmp bh, bl
    "75 F1"  #    44          jne next
    "EF"  #       46          out dx, ax
    "EB CB"  #    47          jmp answer
    #             49 table:   _COMMANDS
)


def boot_sector() -> bytes:
    """Return the guest's disk: 512 bytes."""
    table = b"".join(
        letter + port.to_bytes(2, "little") + word.to_bytes(2, "little")
        for letter, (port, word) in _COMMANDS.items()
    )
    return (_CODE + table).ljust(510, b"\0") + b"\x55\xAA"
