echo join
