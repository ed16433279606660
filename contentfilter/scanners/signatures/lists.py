"""Built-in lists, used if the control directory has no badsignatures or badloadertypes.

Each row is a pattern in base64 letters and its description. ``etc/control/badsignatures`` and
``etc/control/badloadertypes`` contain the same rows; a test compares them. Nine letters determine the first
54 bits of an attachment; five letters determine 30 bits at any position.
"""

SIGNATURES: tuple[tuple[str, str], ...] = (
    ("TVqQAAMAA", "Windows program, the usual linker header"),
    ("TVpQAAIAA", "Windows program, Borland linker"),
    ("TVpAALQAc", "DOS program, 16 bit or packed"),
    ("TVpyAXkAX", "DOS program, last page of 0x172 bytes"),
    ("TVrmAU4AA", "DOS program, last page of 0x1e6 bytes"),
    ("TVrhARwAk", "DOS program, last page of 0x1e1 bytes"),
    ("TVoFAQUAA", "DOS program, last page of 0x105 bytes"),
    ("TVoAAAQAA", "program of four whole pages"),
    ("TVoIARMAA", "DOS program, last page of 0x108 bytes"),
    ("TVouARsAA", "DOS program, last page of 0x12e bytes"),
    ("TVrQAT8AA", "DOS program, last page of 0x1d0 bytes"),
    ("TVoAAAEAA", "program of one whole page, as in PIF files"),
    ("TVoAACQAA", "program of 36 whole pages"),
    ("TVoAAD8AA", "program of 63 whole pages"),
    ("TVqQAAMAB", "Windows program, Go linker before 1.21"),
    ("TVp4AAEAA", "Windows program, LLD (clang, Rust, Zig)"),
    ("TVqAAAEAA", "Windows program, flat assembler"),
    ("TVpAAAEAA", "Windows library, winebuild"),
    ("VFZxUUFBT", "Windows program in base64 twice"),
    ("VkZaeFVVR", "Windows program in base64 three times"),
    ("ZGltIGZpb", "script that begins with dim fil, as Bagle sent it"),
)

# Base64 encodes three bytes at a time and a name such as KERNEL32.dll may start at any of them, so one name needs
# three rows, and each spelling of dll another row if it changes the letters.
LOADERTYPES: tuple[tuple[str, str], ...] = (
    ("MzIuZ", "32.d, the 3 first of three bytes"),
    ("MzIuR", "32.D, the 3 first of three bytes"),
    ("MyLmR", "32.d, the 3 second of three bytes"),
    ("MyLkR", "32.D, the 3 second of three bytes"),
    ("Mi5kb", "32.dl, the 3 third of three bytes"),
    ("Mi5kT", "32.dL, the 3 third of three bytes"),
    ("Mi5ET", "32.DL, the 3 third of three bytes"),
    ("Mi5Eb", "32.Dl, the 3 third of three bytes"),
)
