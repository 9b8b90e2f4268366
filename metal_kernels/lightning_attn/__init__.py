"""Lightning attention: linear attention with one fixed decay a head, in its plain and fast forms."""
