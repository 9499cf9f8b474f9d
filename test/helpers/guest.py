"""A whole guest in one disk sector, told over its serial port how to end.

The firmware loads the sector at 0x7C00 and runs it. The guest says READY, then
obeys commands of one letter each. Every command writes one word to one I/O
port of the `pc` machine, and is answered with its own letter if the guest is
still there to answer. The processor halts between the ticks of the firmware's
timer, 18 a second, so that many guests share a small host.
"""

READY = b"!"

POWER_OFF = b"p"
HIBERNATE = b"h"
REBOOT = b"r"
PANIC = b"c"
START_CRASH_KERNEL = b"k"
LET_WATCHDOG_EXPIRE = b"w"
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
_CRASH_LOADED = 0x02

# The ib700 takes any byte that is written to its two ports for the time until it
# expires: 15 stands for 0 seconds.
_IB700_ENABLE = 0x443
_AT_ONCE = 0x0F0F

# Each command's port, and the word written there.
_COMMANDS = {
    POWER_OFF: (_PM1_CONTROL, _SLEEP | _S5),
    HIBERNATE: (_PM1_CONTROL, _SLEEP | _S4),
    REBOOT: (_RESET_CONTROL, _FULL_RESET),
    PANIC: (_PVPANIC, _PANICKED),
    START_CRASH_KERNEL: (_PVPANIC, _CRASH_LOADED),
    LET_WATCHDOG_EXPIRE: (_IB700_ENABLE, _AT_ONCE),
    # The chip reports the power button only where it is enabled: until this
    # command, and again after a reset, the guest ignores it.
    OBEY_POWER_BUTTON: (_PM1_ENABLE, _POWER_BUTTON),
}

# The bytes; the offset of the first one; what they say to the processor.
_CODE = bytes.fromhex(
    "31 C0"  #    00          xor ax, ax
    "8E D8"  #    02          mov ds, ax
    "FC"  #       04          cld
    "FB"  #       05          sti
    "B3 21"  #    06          mov bl, '!'       READY
    "88 D8"  #    08 answer:  mov al, bl
    "BA F8 03"  # 0A          mov dx, 0x3F8     serial port, data
    "EE"  #       0D          out dx, al
    "F4"  #       0E wait:    hlt
    "BA 00 06"  # 0F          mov dx, 0x600     PM1 status
    "ED"  #       12          in ax, dx
    "F6 C4 01"  # 13          test ah, 1        power button pressed?
    "B3 70"  #    16          mov bl, 'p'       POWER_OFF
    "75 0E"  #    18          jnz obey
    "BA FD 03"  # 1A          mov dx, 0x3FD     serial port, line status
    "EC"  #       1D          in al, dx
    "A8 01"  #    1E          test al, 1        a letter has come?
    "74 EC"  #    20          jz wait
    "BA F8 03"  # 22          mov dx, 0x3F8
    "EC"  #       25          in al, dx
    "88 C3"  #    26          mov bl, al
    "BE 3D 7C"  # 28 obey:    mov si, table
    "AC"  #       2B next:    lodsb             a command's letter, 0 at the end
    "84 C0"  #    2C          test al, al
    "74 DE"  #    2E          jz wait
    "88 C7"  #    30          mov bh, al
    "AD"  #       32          lodsw             its port
    "89 C2"  #    33          mov dx, ax
    "AD"  #       35          lodsw             its word
    "38 DF"  #    36          cmp bh, bl
    "75 F1"  #    38          jne next
    "EF"  #       3A          out dx, ax
    "EB CB"  #    3B          jmp answer
    #             3D table:   _COMMANDS
)


def boot_sector() -> bytes:
    """Return the guest's disk: 512 bytes."""
    table = b"".join(
        letter + port.to_bytes(2, "little") + word.to_bytes(2, "little")
        for letter, (port, word) in _COMMANDS.items()
    )
    return (_CODE + table).ljust(510, b"\0") + b"\x55\xAA"
