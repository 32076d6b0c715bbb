# shellcheck shell=bash
# What the scripts in this folder share. They source it; it does nothing by itself.

refuse() { # MESSAGE
  echo "${0##*/}: $*" >&2
  exit 69
}

# What is about to happen on this machine, one line before each call of a package manager.
announce() { # MESSAGE
  echo "${0##*/}: $*" >&2
}

# Ends this process, and the program that it becomes by `exec`, when the process $LOCK_DB_TEST_SERVER_OWNER has ended.
end_with_owner() {
  [[ -n ${LOCK_DB_TEST_SERVER_OWNER:-} ]] || return 0
  # A grandchild, so that the program has no child that it does not know.
  # shellcheck disable=SC2016
  (setsid bash -c 'while kill -0 "$0" && kill -0 "$1"; do sleep 1; done; kill -s KILL "$1"' \
    "$LOCK_DB_TEST_SERVER_OWNER" $$ >/dev/null 2>&1 </dev/null &)
}

debian_mirror() { # that apt uses here; some of these files are missing on every machine
  local file
  for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [[ -r $file ]] || continue
    sed -n -e 's/^URIs: *\([^ ]*\).*/\1/p' -e 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' "$file"
  done | grep -E '/debian/?$' | head -n 1
}

# Unpacks the newest package whose name matches PATTERN, and the libraries that it needs, into CACHE/root: on Debian from
# unstable, by the mirror that apt uses here; on Ubuntu from the release itself. Nothing is installed, and apt's own state
# is not touched. Exits with status 69 when there is no such package, or none of VERSION or newer.
unpack_package() { # CACHE PROGRAM PATTERN [VERSION]
  local cache=$1 program=$2 pattern=$3 oldest=${4:-0} distribution
  # shellcheck source=/dev/null
  distribution=$(. /etc/os-release 2>/dev/null && echo "${ID:-}") || true
  case $distribution in
    debian | ubuntu) ;;
    *) refuse "only Debian and Ubuntu have packages that this can unpack" ;;
  esac

  mkdir -p "$cache"
  exec 9>"$cache/lock"
  flock 9
  # Another process may have fetched it meanwhile.
  [[ ! -x $cache/root/$program ]] || return 0

  # An apt of its own: lists, archives and an empty status, so that every library comes along as well.
  local apt=$cache/apt root=$cache/root
  # shellcheck disable=SC2064
  trap "rm -rf ${apt@Q} ${root@Q}.new" EXIT
  rm -rf "$apt" "$root.new"
  mkdir -p "$apt"/{lists,archives}/partial "$root.new"
  : >"$apt/status"
  local options=(-o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt" -o "Dir::State::status=$apt/status"
    -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=2)
  if [[ $distribution == debian ]]; then
    local mirror
    mirror=$(debian_mirror) || refuse "no Debian mirror in apt's sources"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s sid main\n' "$mirror" \
      >"$apt/sources.list"
    options+=(-o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null)
  fi

  announce "about to run \`apt-get update\`, with lists of its own in $apt"
  apt-get "${options[@]}" -qq update >&2 || refuse "apt-get update failed"
  local package version
  package=$(apt-cache "${options[@]}" search --names-only "$pattern" | cut -d ' ' -f 1 | sort -V | tail -n 1)
  [[ -n $package ]] || refuse "no package $pattern"
  version=$(apt-cache "${options[@]}" show --no-all-versions "$package" | sed -n 's/^Version: //p' | head -n 1)
  dpkg --compare-versions "$version" ge "$oldest" || refuse "$package is too old: $version, not $oldest"
  announce "about to run \`apt-get --download-only install $package\` ($version), to be unpacked in $root"
  apt-get "${options[@]}" -qq -y --no-install-recommends --download-only install "$package" >&2 ||
    refuse "the download of $package failed"
  local archive
  for archive in "$apt"/archives/*.deb; do
    case ${archive##*/} in
      libperl*) ;; # large, and for scripts that are not run here
      "${package}_"* | lib* | zlib* | openssl-provider-*) dpkg-deb --extract "$archive" "$root.new" ;;
    esac
  done
  [[ -x $root.new/$program ]] || refuse "$package has no $program"
  mv "$root.new" "$root"
}

# Becomes a program that was unpacked. It may be of a newer release than the machine, so it runs under the loader and with
# the libraries that came with it.
become_unpacked() { # CACHE PROGRAM ARGUMENT…
  local root=$1/root program=$2 library
  local -a loader
  shift 2
  library=$(echo "$root"/usr/lib/*-linux-gnu)
  loader=("$library"/ld-linux*.so.*)
  exec "${loader[0]}" --library-path "$library" "$root/$program" "$@"
}
