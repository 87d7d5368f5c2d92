"""``python -m replib`` is the ``replib`` command."""

from replib.cli import main

raise SystemExit(main())
