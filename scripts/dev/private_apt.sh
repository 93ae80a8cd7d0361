# Sourced: Debian's packages without root and without installing them, for any architecture.
#
#   private_apt FOLDER ARCHITECTURE SUITE COMPONENTS   makes an apt of its own, with lists, cache and
#                                                      settings in FOLDER, the one of this shell
#   unpack_packages FOLDER PACKAGES...                 downloads them with it, into FOLDER

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
if ! [ -e $keyring ]; then
  echo "error: there is no $keyring; on Debian or Ubuntu: apt-get install debian-archive-keyring" >&2
  exit 1
fi

private_apt() {
  mkdir -p "$1/lists/partial" "$1/cache/archives/partial"
  touch "$1/status"
  echo "deb [arch=$2 signed-by=$keyring] http://deb.debian.org/debian $3 $4" >"$1/sources.list"
  cat >"$1/apt.conf" <<CONF
Dir::State "$1"; Dir::State::status "$1/status"; Dir::Cache "$1/cache";
Dir::Etc::sourcelist "$1/sources.list"; Dir::Etc::sourceparts "/dev/null"; APT::Sandbox::User "";
APT::Architecture "$2"; APT::Architectures { "$2"; }; APT::Install-Recommends "0";
CONF
  export APT_CONFIG=$1/apt.conf
  apt-get update -qq
}

unpack_packages() {
  local folder=$1 debs=${APT_CONFIG%/*}/debs package
  shift
  mkdir "$debs"
  (cd "$debs" && apt-get download -qq "$@")
  for package in "$debs"/*.deb; do dpkg-deb -x "$package" "$folder"; done
  rm -rf "$debs"
}
