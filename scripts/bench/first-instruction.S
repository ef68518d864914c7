# The smallest PVH kernel: its first instructions write one letter to the serial port, then it halts for ever.
# Built by scripts/bench/boot; entry in 32-bit mode without paging (PVH boot protocol).
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                      # name size, description size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start
    .text
    .code32
    .globl start
start:
    mov $0x3f8, %dx
    mov $'X', %al
    out %al, %dx
    mov $'\n', %al
    out %al, %dx
halt:
    cli
    hlt
    jmp halt
