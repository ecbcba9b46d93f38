# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# The container images of the demo and the tests, as OCI archives in TOOLS_DIR/images. No registry takes
# part: their roots are Debian packages and programs of this project. Sourced by setup.sh.

IMAGES_SOURCE=$SETUP_DIR/images

# pack NAME ROOT makes TOOLS_DIR/images/NAME.tar of the folder ROOT, with the configuration images/NAME.json.
pack() {
	mkdir -p "$TOOLS_DIR/images"
	(cd "$PROJECT_DIR" && CGO_ENABLED=0 go run -buildvcs=false ./contrib/setup/mkimage -ref "docker.io/library/$1:latest" \
		-config "$IMAGES_SOURCE/$1.json" -root "$2" -out "$TOOLS_DIR/images/$1.tar")
}

# base_files ROOT writes the few files of /etc that programs ask for by name.
base_files() {
	local root=$1
	mkdir -p "$root/etc" "$root/dev" "$root/proc" "$root/sys" "$root/run" "$root/root" "$root/usr/local/bin" "$root/var"
	mkdir -p -m 1777 "$root/tmp"
	chmod 1777 "$root/tmp"
	install -m 644 "$IMAGES_SOURCE/passwd" "$root/etc/passwd"
	install -m 644 "$IMAGES_SOURCE/group" "$root/etc/group"
	printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$root/etc/nsswitch.conf"
}

image_busybox() {
	local root=$TOOLS_DIR/tmp/busybox unpacked=$TOOLS_DIR/tmp/busybox-packages applet
	rm -rf "$root" "$unpacked"
	# shellcheck disable=SC2086
	debian_extract "$IMAGES_SUITE" "$unpacked" $BUSYBOX_PACKAGES
	mkdir -p "$root/bin"
	install -m 755 "$unpacked/usr/bin/busybox" "$root/bin/busybox"
	for applet in $("$root/bin/busybox" --list); do
		[ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
	done
	base_files "$root"
	pack cohort-busybox "$root"
	rm -rf "$root" "$unpacked"
}

# image_data is PostgreSQL and Redis as Debian packages them. No maintainer script has run in this root:
# the cluster is made by run-postgres when a container first starts, as the user that will own it.
image_data() {
	local root=$TOOLS_DIR/tmp/data
	rm -rf "$root"
	# shellcheck disable=SC2086
	debian_extract "$IMAGES_SUITE" "$root" $DATA_PACKAGES
	rm -rf "$root"/usr/share/{doc,man,locale,info,lintian,perl,perl5} "$root"/usr/lib/*/{gconv,perl,perl-base} \
		"$root"/usr/lib/llvm* "$root"/usr/lib/*/libLLVM* "$root"/usr/lib/postgresql/*/lib/{bitcode,llvmjit*}
	base_files "$root"
	[ -e "$root/bin/sh" ] || ln -s dash "$root/usr/bin/sh"
	install -m 755 "$IMAGES_SOURCE/run-postgres" "$IMAGES_SOURCE/run-redis" "$root/usr/local/bin/"
	mkdir -p "$root/var/lib/postgresql" "$root/var/lib/redis"
	chown 101:101 "$root/var/lib/postgresql"
	chown 102:102 "$root/var/lib/redis"
	chmod 700 "$root/var/lib/postgresql" "$root/var/lib/redis"
	pack cohort-data "$root"
	rm -rf "$root"
}

# image_tools holds the project's own test programs. They change while cohort is worked on, so it is not a
# stamped step: they are built whenever a source file is newer than the image, and packed if they differ.
image_tools() {
	local root=$TOOLS_DIR/tools-root image=$TOOLS_DIR/images/cohort-tools.tar sum=$STAMP_DIR/image-tools
	if [ -f "$sum" ] && [ -f "$image" ] && [ -z "$(find "$PROJECT_DIR" \
		\( -name '.?*' -o -name bin \) -prune -o \
		\( -name '*.go' -o -name go.mod -o -path "$IMAGES_SOURCE/cohort-tools.json" \) -newer "$sum" -print -quit)" ]; then
		return 0
	fi
	local -a programs
	cd "$PROJECT_DIR"
	mapfile -t programs < <(find integration -type f -path '*/cmd/*/*.go' ! -name '*_test.go' -printf './%h\n' | sort -u)
	say "set-up: image cohort-tools (${#programs[@]} programs) ..."
	mkdir -p "$root/bin" "$STAMP_DIR" "$TOOLS_DIR/log"
	: >"$sum.begin"
	rm -f "$root"/bin/*
	base_files "$root"
	if [ ${#programs[@]} -gt 0 ]; then
		CGO_ENABLED=0 go build -buildvcs=false -o "$root/bin/" "${programs[@]}" >&2 || die "the test programs do not compile" "see the lines above"
	fi
	local content
	content=$(key_of "@$IMAGES_SOURCE/cohort-tools.json" "$(cd "$root" && find . -type f -exec sha256sum {} + | sort -k 2)")
	if [ ! -f "$image" ] || [ "$(cat "$sum" 2>/dev/null)" != "$content" ]; then
		pack cohort-tools "$root"
	fi
	printf '%s\n' "$content" >"$sum"
	# Sources may have changed while they were being built: the stamp's age is that of the beginning.
	touch -r "$sum.begin" "$sum"
	rm -f "$sum.begin"
}

image_step() {
	local name=$1 work=$2
	shift 2
	step "$name" "$(key_of "$(debian_arch)" "$IMAGES_SUITE" "$(declare -f "$work" base_files debian_extract)" \
		"@$SETUP_DIR/mkimage/main.go" "@$IMAGES_SOURCE/passwd" "@$IMAGES_SOURCE/group" "$@")" "$work"
}

setup_images() {
	image_step image-busybox image_busybox "$BUSYBOX_PACKAGES" "@$IMAGES_SOURCE/cohort-busybox.json"
	image_step image-data image_data "$DATA_PACKAGES" "@$IMAGES_SOURCE/cohort-data.json" \
		"@$IMAGES_SOURCE/run-postgres" "@$IMAGES_SOURCE/run-redis"
}
