"""blockhess in the tools that people already use; each module imports its tool, and nothing here imports them."""
