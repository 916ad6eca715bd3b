// In place of the theme's icon library of 1.5 MB: its few icons are drawn in book.css.
