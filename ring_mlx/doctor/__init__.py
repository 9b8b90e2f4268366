"""Whether a machine is fit to run Ring models, and what is missing.

Modules, each using those above it; none imports MLX before it is asked, so that a broken one can be named:

    finding      one thing looked at              machine      chip, memory, operating system, MLX's backend
    versions     Python and packages              kernels      each kernel against its plain form
    tuning       what was chosen as the fastest   disk         room and permissions
    models       the hub cache, and what fits     examine      all of them in order
    decay_text   long texts that a wrong decay makes less likely
    decay_check  which decay a checkpoint was trained with
    report_parts what a report holds, each part in a process of its own
    report_page  the report as Markdown           report       all parts in order, without names or folders
"""
