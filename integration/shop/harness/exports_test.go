// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"os"
	"slices"
	"testing"
)

func TestExportLinesOfTheSetUpAreApplied(t *testing.T) {
	t.Setenv("BASE", "/base")
	for _, v := range []string{"SHOP_A", "SHOP_B", "SHOP_C", "SHOP_D"} {
		t.Setenv(v, "")
	}
	err := ApplyExports("some words\nexport SHOP_A=/run/x.sock\nexport SHOP_B='a b $BASE'\nexport SHOP_C=\"/bin:$BASE\";\n  export SHOP_D=${BASE}/d\n")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"SHOP_A": "/run/x.sock", "SHOP_B": "a b $BASE", "SHOP_C": "/bin:/base", "SHOP_D": "/base/d"} {
		if have := os.Getenv(name); have != want {
			t.Errorf("%s is %q, want %q", name, have, want)
		}
	}
	if ApplyExports("export nothing") == nil {
		t.Error("a line that sets nothing was taken")
	}
}

func TestTheShopIsRunByAPlainStockCommand(t *testing.T) {
	o := Options{Ctr: CtrFromEnv(), Group: "shop", Net: &Net{Group: "shop-x", GroupIP: "10.213.7.2"}}
	have := o.Ctr.RunArgs(o.Members()[0])
	want := []string{
		"ctr", "run", "--detach", "--runtime", "io.containerd.cohort.v2", "--snapshotter", "cohort", "--null-io",
		"--annotation", "io.cohort.group=shop", "--annotation", "io.cohort.member=db",
		"--with-ns", "network:/var/run/netns/shop-x",
		"docker.io/library/cohort-data:latest", "shop-db", "/usr/local/bin/run-postgres",
	}
	if !slices.Equal(have, want) {
		t.Errorf("have %q", have)
	}
}
