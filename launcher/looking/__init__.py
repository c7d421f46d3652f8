"""Looking at runs that are there: runs, compare, watch and report read their files and write nothing of theirs."""
