"""The `kleash` command.

main          one function per sub-command; heavy imports happen inside them
console       what a command line is read into, and the output of `kleash kl`
plan          `kleash plan`; demo and demo_output are `kleash demo`

Everything else prints through kleash.report.terminal. Start reading at main.main.
"""
