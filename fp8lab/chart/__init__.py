"""The first page's chart: `switch` makes its points, the picture of them and its data; `page` the interactive twin."""
