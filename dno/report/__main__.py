"""`python -m dno.report RUN_FOLDER ...`: a page of one or several runs."""

from dno.report.page import main

if __name__ == "__main__":
    main()
