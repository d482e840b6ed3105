// The page as one file: the answer stands in it.

import { View } from "./view.js";

const { look, name } = JSON.parse(document.getElementById("look-data").textContent);
document.title = `${name}: vitreous`;
new View().show(look, name).catch((error) => {
  const place = document.getElementById("error");
  place.hidden = false;
  place.textContent = `The page cannot be shown. ${error.message}`;
});
