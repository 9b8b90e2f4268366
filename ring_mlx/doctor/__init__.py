"""Whether a machine is fit to run Ring models, and what is missing.

Modules, each using those above it; most import MLX only in their checks, so that a broken MLX is a finding:

    finding      results, and all checks in order machine      chip, memory, operating system, MLX's backend
    versions     Python and packages              kernels      each kernel against its plain form
    disk         free space and permissions       tuning       choices for this machine, shown or made
    models       the hub cache, and what fits     decay_text   long texts that a wrong decay makes less likely
    decay_check  which decay a checkpoint was trained with
    report_parts what a report holds, each part in a process of its own
    report_page  the report as Markdown           report       all parts in order, without names or folders
"""
